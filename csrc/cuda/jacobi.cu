// jacobi.hpp on CUDA: a thread block a matrix.
#include "jacobi.hpp"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../jacobi.hpp"

namespace fastlora::cuda {

namespace {

constexpr int THREADS = 256;
// Blocks a multiprocessor must have room for. Left to itself, the compiler aims at more and spills.
constexpr int RESIDENT = 2;
constexpr int PARTS = 4;  // of a dot: 64 pairs of columns keep all threads busy
constexpr int HALF = LARGEST / 2;

struct Block {
    template <class Body>
    __device__ void each(int count, const Body& body) const {
        for (int i = threadIdx.x; i < count; i += THREADS) body(i);
        __syncthreads();
    }

    template <class Body>
    __device__ void each(int rows, int columns, const Body& body) const {
        for (int i = threadIdx.x; i < rows * columns; i += THREADS) body(i / columns)(i % columns);
        __syncthreads();
    }

    template <class Body>
    __device__ bool any(int count, const Body& body) const {
        bool found = false;
        for (int i = threadIdx.x; i < count; i += THREADS) found |= body(i);
        return __syncthreads_or(found);
    }
};

// An odd stride keeps a column's elements in different banks of the shared memory.
__host__ __device__ constexpr int odd(int count) { return count | 1; }

// Doubles that a matrix needs: where they fit they are shared, else they lie in the workspace.
int doubles(const SymmetricEigen& call) {
    return call.n * (call.n + 1) / 2 + call.n * odd(call.n);
}
int doubles(const Svd& call) { return call.n * odd(call.m) + call.n * odd(call.n); }

struct Scratch {
    Rotation<double> rotations[HALF];
    Pair pairs[HALF];
    double line[LARGEST], spare[LARGEST];
    double dots[HALF * PARTS * 3];
    int places[LARGEST];
    bool moves[HALF];

    __device__ Round<double> round() { return {rotations, pairs, moves}; }
};

extern __shared__ double shared_doubles[];

__device__ double* own_doubles(double* workspace, int count) {
    return workspace ? workspace + blockIdx.x * static_cast<std::int64_t>(count) : shared_doubles;
}

template <class Value>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    eigen_kernel(SymmetricEigen call, double* workspace, int size) {
    __shared__ Scratch scratch;
    const Block team;
    const int n = call.n, stride = odd(n);
    double* a = own_doubles(workspace, size);
    double* v = a + n * (n + 1) / 2;
    const Lane line{scratch.line, 1};
    for (std::int64_t matrix = blockIdx.x; matrix < call.count; matrix += gridDim.x) {
        const Value* source = static_cast<const Value*>(call.a) + matrix * n * n;
        const Scale scale = scale_of(team, source, n, n, true, line);
        Outcome outcome = Outcome::not_finite;
        if (scale.finite) {
            load_triangle(team, source, n, scale.into, {a, 1});
            const double late = diagonalize(team, n, call.sweeps, a, v, stride, scratch.line,
                                            scratch.round());
            outcome = late != 0 ? Outcome::not_converged : Outcome::solved;
            store_eigen(team, n, {a, 1}, {v, 1}, stride, scale.back, line, scratch.places,
                        static_cast<Value*>(call.w) + matrix * n,
                        static_cast<Value*>(call.v) + matrix * n * n);
        }
        if (threadIdx.x == 0) call.outcomes[matrix] = outcome;
        __syncthreads();  // all have read `line` before the next matrix is written there
    }
}

template <class Value>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    svd_kernel(Svd call, double* workspace, int size) {
    __shared__ Scratch scratch;
    const Block team;
    const int n = call.n, m = call.m, a_stride = odd(m), v_stride = odd(n);
    double* a = own_doubles(workspace, size);
    double* v = a + n * a_stride;
    const Lane line{scratch.line, 1};
    for (std::int64_t matrix = blockIdx.x; matrix < call.count; matrix += gridDim.x) {
        const Value* source = static_cast<const Value*>(call.a) + matrix * m * n;
        const Scale scale = scale_of(team, source, m, n, false, line);
        Outcome outcome = Outcome::not_finite;
        if (scale.finite) {
            load_columns(team, source, m, n, scale.into, {a, 1}, a_stride);
            const double late = orthogonalize(team, n, m, call.sweeps, a, a_stride, v, v_stride,
                                              PARTS, scratch.dots, scratch.round());
            outcome = late != 0 ? Outcome::not_converged : Outcome::solved;
            store_svd(team, n, m, {a, 1}, a_stride, {v, 1}, v_stride, scale.back, line,
                      {scratch.spare, 1}, scratch.places,
                      static_cast<Value*>(call.u) + matrix * m * n,
                      static_cast<Value*>(call.s) + matrix * n,
                      static_cast<Value*>(call.vh) + matrix * n * n);
        }
        if (threadIdx.x == 0) call.outcomes[matrix] = outcome;
        __syncthreads();
    }
}

void check(cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    }
}

int attribute(cudaDeviceAttr name) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
}

template <class Call>
bool fits(const Call& call) {
    const std::size_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return sizeof(Scratch) + doubles(call) * sizeof(double) + 1024 <= most;
}

// In the workspace, which every block has a part of, a few matrices a multiprocessor are under way.
template <class Call>
std::int64_t blocks(const Call& call) {
    const std::int64_t most =
        fits(call) ? 1 << 30 : RESIDENT * attribute(cudaDevAttrMultiProcessorCount);
    return call.count < most ? call.count : most;
}

template <class Call>
std::size_t needed(const Call& call) {
    return fits(call) ? 0 : blocks(call) * doubles(call) * sizeof(double);
}

template <class Call>
void launch(void (*kernel)(Call, double*, int), const Call& call, void* workspace, void* stream) {
    if (call.count == 0) return;
    const std::size_t bytes = workspace ? 0 : doubles(call) * sizeof(double);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)));
    kernel<<<static_cast<unsigned>(blocks(call)), THREADS, bytes,
             static_cast<cudaStream_t>(stream)>>>(call, static_cast<double*>(workspace),
                                                  doubles(call));
    check(cudaGetLastError());
}

}  // namespace

std::size_t workspace(const SymmetricEigen& call) { return needed(call); }
std::size_t workspace(const Svd& call) { return needed(call); }

void symmetric_eigen(const SymmetricEigen& call, void* workspace, void* stream) {
    launch(call.wide ? &eigen_kernel<double> : &eigen_kernel<float>, call, workspace, stream);
}

void svd(const Svd& call, void* workspace, void* stream) {
    launch(call.wide ? &svd_kernel<double> : &svd_kernel<float>, call, workspace, stream);
}

}  // namespace fastlora::cuda
