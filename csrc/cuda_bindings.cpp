// Python's way to the CUDA kernels, as bindings.cpp is to the others: a module of its own, so that
// the core loads where there is no CUDA. Addresses are the device's, the caller has made it the
// current one, and `stream` is a cudaStream_t.
#include <pybind11/pybind11.h>

#include "cuda/jacobi.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

void* at(Address address) { return reinterpret_cast<void*>(address); }

fastlora::SymmetricEigen eigen_call(Address a, bool wide, std::int64_t count, int n, int sweeps,
                                    Address w, Address v, Address outcomes) {
    return {at(a), wide, count, n, sweeps,
            at(w), at(v), static_cast<fastlora::Outcome*>(at(outcomes))};
}

fastlora::Svd svd_call(Address a, bool wide, std::int64_t count, int m, int n, int sweeps,
                       Address u, Address s, Address vh, Address outcomes) {
    return {at(a), wide, count, m, n, sweeps,
            at(u), at(s), at(vh), static_cast<fastlora::Outcome*>(at(outcomes))};
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    module.doc() = "fastlora's native core on CUDA";
    // Bytes to pass as `workspace`.
    module.def("symmetric_eigen_workspace", [](bool wide, std::int64_t count, int n) {
        return fastlora::cuda::workspace(eigen_call(0, wide, count, n, 0, 0, 0, 0));
    });
    module.def("svd_workspace", [](bool wide, std::int64_t count, int m, int n) {
        return fastlora::cuda::workspace(svd_call(0, wide, count, m, n, 0, 0, 0, 0, 0));
    });
    module.def("symmetric_eigen", [](Address a, bool wide, std::int64_t count, int n, int sweeps,
                                     Address w, Address v, Address outcomes, Address workspace,
                                     Address stream) {
        const auto call = eigen_call(a, wide, count, n, sweeps, w, v, outcomes);
        py::gil_scoped_release released;
        fastlora::cuda::symmetric_eigen(call, at(workspace), at(stream));
    });
    module.def("svd", [](Address a, bool wide, std::int64_t count, int m, int n, int sweeps,
                         Address u, Address s, Address vh, Address outcomes, Address workspace,
                         Address stream) {
        const auto call = svd_call(a, wide, count, m, n, sweeps, u, s, vh, outcomes);
        py::gil_scoped_release released;
        fastlora::cuda::svd(call, at(workspace), at(stream));
    });
}
