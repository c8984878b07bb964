// With cuda_bindings.cpp, and the headers of lists of tensors, the only file that knows Python. Arrays come in as addresses: the callers in
// fastlora/ops, each named after its kernel's file, have checked dtypes, shapes and strides. Every
// call takes the number of threads and the name of an instruction set, "" for the widest.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/adapter_linear.hpp"
#include "cpu/block_lanczos.hpp"
#include "cpu/dropout.hpp"
#include "cpu/isa.hpp"
#include "cpu/jacobi.hpp"
#include "cpu/low_rank_update.hpp"
#include "cpu/output_pass.hpp"
#include "cpu/row_norm.hpp"
#include "cpu/sum_of_products.hpp"
#include "norm_memory.hpp"
#include "sign_momentum_table.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

fastlora::RowNorm row_norm_call(Address weight, std::int64_t row, std::int64_t column,
                                std::int64_t n, std::int64_t k, std::int64_t r, Address lora_A,
                                std::int64_t a_stride, Address lora_B, std::int64_t b_stride,
                                double scaling, double cancellation, double floor, Address norm) {
    fastlora::RowNorm call{};
    call.weight = at<const float>(weight);
    call.row = row;
    call.column = column;
    call.n = n;
    call.k = k;
    call.r = r;
    call.lora_A = at<const float>(lora_A);
    call.a_stride = a_stride;
    call.lora_B = at<const float>(lora_B);
    call.b_stride = b_stride;
    call.scaling = scaling;
    call.cancellation = cancellation;
    call.floor = floor;
    call.norm = at<float>(norm);
    return call;
}

std::int64_t row_norm(Address weight, std::int64_t row, std::int64_t column, std::int64_t n,
                      std::int64_t k, std::int64_t r, Address lora_A, std::int64_t a_stride,
                      Address lora_B, std::int64_t b_stride, double scaling, double cancellation,
                      double floor, Address norm, Address known_sq, Address weight_sq, Address lost,
                      int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), row_norm);
    auto call = row_norm_call(weight, row, column, n, k, r, lora_A, a_stride, lora_B, b_stride,
                              scaling, cancellation, floor, norm);
    call.known_sq = at<const double>(known_sq);
    call.weight_sq = at<double>(weight_sq);
    call.lost = at<std::uint8_t>(lost);
    py::gil_scoped_release released;
    return kernel(call, threads);
}

py::object remembered_norm(fastlora::NormMemory& memory, Address weight, std::int64_t row,
                           std::int64_t column, std::int64_t n, std::int64_t k, std::int64_t r,
                           Address lora_A, std::int64_t a_stride, Address lora_B,
                           std::int64_t b_stride, double scaling, double cancellation, double floor,
                           Address norm_at, std::int64_t version, const py::object& norm,
                           int threads, const std::string& isa) {
    const auto call = row_norm_call(weight, row, column, n, k, r, lora_A, a_stride, lora_B, b_stride,
                                    scaling, cancellation, floor, norm_at);
    return memory.update(call, version, norm, threads, isa);
}

std::int64_t output_pass(Address dy, std::int64_t rows, std::int64_t columns,
                         std::int64_t dy_stride, Address g, Address scaled, Address read,
                         std::int64_t read_stride, Address bias, double least, double most,
                         double hidden, Address dg, Address unread, std::int64_t r, Address c,
                         std::int64_t c_stride, double factor, Address h, Address t,
                         std::int64_t t_stride, Address dc, int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), output_pass);
    const fastlora::OutputPass call{
        at<const float>(dy), rows, columns, dy_stride,
        at<const float>(g), at<float>(scaled),
        at<const float>(read), read_stride, at<const float>(bias), least, most, hidden,
        at<float>(dg), at<std::uint8_t>(unread),
        r, at<const float>(c), c_stride, factor, at<float>(h),
        at<const float>(t), t_stride, at<float>(dc)};
    py::gil_scoped_release released;
    return kernel(call, threads);
}

void low_rank_update(Address out, std::int64_t rows, std::int64_t columns, std::int64_t out_stride,
                     Address a, std::int64_t a_stride, std::int64_t r, Address b,
                     std::int64_t b_row, std::int64_t b_column, Address g, Address bias,
                     Address bits, int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), low_rank_update);
    const fastlora::LowRankUpdate call{
        at<float>(out), rows, columns, out_stride,
        at<const float>(a), a_stride, r,
        at<const float>(b), b_row, b_column,
        at<const float>(g), at<const float>(bias), at<const std::uint16_t>(bits)};
    py::gil_scoped_release released;
    kernel(call, threads);
}

// a, its stride, the depth; b, its strides of rows and of columns; the depth's scale
using TermTuple = std::tuple<Address, std::int64_t, std::int64_t, Address, std::int64_t,
                             std::int64_t, Address>;

void sum_of_products(Address out, std::int64_t rows, std::int64_t columns, std::int64_t out_stride,
                     const std::vector<TermTuple>& terms, Address g, Address bias, int slice,
                     int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), sum_of_products);
    if (terms.empty()) throw std::invalid_argument("a sum of no products");
    std::vector<fastlora::Term> own;
    for (const auto& [a, a_stride, depth, b, b_row, b_column, scale] : terms) {
        own.push_back({at<const float>(a), a_stride, depth, at<const float>(b), b_row, b_column,
                       at<const float>(scale)});
    }
    const fastlora::SumOfProducts call{
        at<float>(out), rows, columns, out_stride, own.data(), static_cast<int>(own.size()),
        at<const float>(g), at<const float>(bias), slice};
    py::gil_scoped_release released;
    kernel(call, threads);
}

// its address and strides
using MatrixTuple = std::tuple<Address, std::int64_t, std::int64_t>;

// rows, in, out, r; x and its stride; W, A, B; factor; seed and threshold of the mask; slice, small
using LayerTuple =
    std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, Address, std::int64_t,
               MatrixTuple, MatrixTuple, MatrixTuple, double, std::int64_t, int, int, std::int64_t>;

fastlora::AdapterLinear adapter_linear(const LayerTuple& layer) {
    const auto& [rows, in, out, r, x, x_stride, w, a, b, factor, seed, threshold, slice, small] = layer;
    const auto matrix = [](const MatrixTuple& m) {
        return fastlora::Matrix{at<const float>(std::get<0>(m)), std::get<1>(m), std::get<2>(m)};
    };
    return {rows, in, out, r, at<const float>(x), x_stride, matrix(w), matrix(a), matrix(b),
            static_cast<float>(factor), static_cast<std::uint64_t>(seed),
            static_cast<std::uint32_t>(threshold), slice, small};
}

void adapter_linear_forward(const LayerTuple& layer, Address bias, Address y, Address t,
                            int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), adapter_linear_forward);
    const auto own = adapter_linear(layer);
    py::gil_scoped_release released;
    kernel(own, {at<const float>(bias), at<float>(y), at<float>(t)}, threads);
}

void adapter_linear_backward(const LayerTuple& layer, Address dy, std::int64_t dy_stride, Address t,
                             Address dx, Address da, Address db, int threads,
                             const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), adapter_linear_backward);
    const auto own = adapter_linear(layer);
    py::gil_scoped_release released;
    kernel(own, {at<const float>(dy), dy_stride, at<const float>(t), at<float>(dx), at<float>(da),
                 at<float>(db)}, threads);
}

void dropout(Address x, std::int64_t rows, std::int64_t columns, std::int64_t x_stride, Address out,
             std::int64_t out_stride, std::int64_t seed, int threshold, Address bits, bool drawn,
             int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), dropout);
    const fastlora::Dropout call{
        at<const float>(x), rows, columns, x_stride, at<float>(out), out_stride,
        static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(threshold),
        at<std::uint16_t>(bits), drawn};
    py::gil_scoped_release released;
    kernel(call, threads);
}

void block_lanczos(const std::vector<Address>& x, std::int64_t stride, std::int64_t rows,
                   std::int64_t columns, std::int64_t width, std::int64_t blocks, Address start,
                   std::int64_t start_stride, bool left, std::int64_t q, double low, double high,
                   double alike, double growth, double least, double rounded_least, Address u,
                   Address s, Address vh, Address squares, Address checked, Address found,
                   int threads, const std::string& isa) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), block_lanczos);
    std::vector<const float*> matrices;
    for (const Address address : x) matrices.push_back(at<const float>(address));
    const fastlora::BlockLanczos call{
        matrices.data(), static_cast<std::int64_t>(x.size()), stride, rows, columns, width, blocks,
        at<const float>(start), start_stride, left, q, low, high, alike, growth, least, rounded_least,
        at<float>(u), at<double>(s), at<float>(vh),
        at<double>(squares), at<double>(checked), at<fastlora::Found>(found)};
    py::gil_scoped_release released;
    kernel(call, threads);
}

std::int64_t symmetric_eigen(Address a, bool wide, std::int64_t count, int n, int sweeps, Address w,
                             Address v, Address outcomes, int threads, const std::string& isa,
                             bool backwards) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), symmetric_eigen);
    const fastlora::SymmetricEigen call{
        at<const void>(a), wide, count, n, sweeps,
        at<void>(w), at<void>(v), at<fastlora::Outcome>(outcomes)};
    py::gil_scoped_release released;
    return kernel(call, backwards, threads);
}

std::int64_t svd(Address a, bool wide, std::int64_t count, int m, int n, int sweeps, Address u,
                 Address s, Address vh, Address outcomes, int threads, const std::string& isa,
                 bool backwards) {
    const auto kernel = FASTLORA_PICK(fastlora::find_isa(isa), svd);
    const fastlora::Svd call{
        at<const void>(a), wide, count, m, n, sweeps,
        at<void>(u), at<void>(s), at<void>(vh), at<fastlora::Outcome>(outcomes)};
    py::gil_scoped_release released;
    return kernel(call, backwards, threads);
}

bool same(Address one, Address other, std::size_t bytes) {
    return std::memcmp(at<const void>(one), at<const void>(other), bytes) == 0;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "fastlora's native core";
    module.def("isas", &fastlora::isas, "Instruction sets that this processor can run, widest last");
    module.def("has_bfloat16", &fastlora::has_bfloat16,
               "Whether it has AVX-512's products of bfloat16");
    module.def("row_norm", &row_norm);
    module.def("output_pass", &output_pass);
    module.def("low_rank_update", &low_rank_update);
    module.def("sum_of_products", &sum_of_products);
    module.def("dropout", &dropout);
    module.def("adapter_linear_forward", &adapter_linear_forward);
    module.def("adapter_linear_backward", &adapter_linear_backward);
    module.def("block_lanczos", &block_lanczos);
    module.def("symmetric_eigen", &symmetric_eigen);
    module.def("svd", &svd);
    py::class_<fastlora::SignMomentumTable>(module, "SignMomentumTable")
        .def(py::init<py::object, py::object>())
        .def("read", &fastlora::SignMomentumTable::read)
        .def("__len__", &fastlora::SignMomentumTable::size)
        .def("run", &fastlora::SignMomentumTable::run);
    py::class_<fastlora::NormMemory>(module, "NormMemory")
        .def(py::init())
        .def("update", &remembered_norm)
        .def("keep", &fastlora::NormMemory::keep)
        .def("forget", &fastlora::NormMemory::forget);
    module.def("same", &same, "Whether as many bytes at two addresses are equal");
}
