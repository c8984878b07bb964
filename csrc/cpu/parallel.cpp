#include "parallel.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace fastlora {

namespace {

// The entry points that GCC's and LLVM's runtimes have in common.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using InParallel = int (*)();

struct Runtime {
    Parallel parallel;
    InParallel in_parallel;
};

const Runtime& runtime() {
    static const Runtime found{
        reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
        reinterpret_cast<InParallel>(dlsym(RTLD_DEFAULT, "omp_in_parallel")),
    };
    return found;
}

using Body = void (*)(void*, std::int64_t, std::int64_t);

struct Work {
    std::int64_t count;
    std::int64_t step;  // the length of every range but the last; 0: see parallel_units
    void* state;
    Body body;
    std::int64_t unit = 0;
    int threads = 0;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr thrown{};  // what the first body threw that did

    // Whoever comes takes the next range, so it does not matter how many threads come.
    void run() {
        try {
            for (std::int64_t first = next; !failed && first < count;) {
                const std::int64_t last = std::min(first + length(first), count);
                if (!next.compare_exchange_weak(first, last)) continue;
                body(state, first, last);
                first = next;
            }
        } catch (...) {  // nothing may be thrown out of a thread
            if (!failed.exchange(true)) thrown = std::current_exception();
        }
    }

    // Of the range that begins at `first`.
    std::int64_t length(std::int64_t first) const {
        if (step > 0) return step;
        const std::int64_t share = (count - first) / (2 * threads);
        if (share >= unit && first % unit == 0) return share - share % unit;
        const std::int64_t half = std::min((unit + 1) / 2, count / threads);
        return std::min(std::max<std::int64_t>(half, 1), unit - first % unit);
    }
};

}  // namespace

std::int64_t range_length(std::int64_t count, std::int64_t grain, int threads) {
    const std::int64_t grains = (count + grain - 1) / grain;
    const std::int64_t ranges = std::max<std::int64_t>(std::min<std::int64_t>(threads, grains), 1);
    return std::max<std::int64_t>((grains + ranges - 1) / ranges, 1) * grain;
}

namespace {

void run_on_threads(Work& work, unsigned ranges) {
    const Runtime& omp = runtime();
    if (ranges == 1 || (omp.in_parallel && omp.in_parallel())) {
        work.run();
        return;
    }
    if (omp.parallel) {
        omp.parallel([](void* all) { static_cast<Work*>(all)->run(); }, &work,
                     ranges, 0);
        return;
    }
    std::vector<std::thread> others;
    try {
        for (unsigned index = 1; index < ranges; ++index) others.emplace_back([&] { work.run(); });
    } catch (const std::system_error&) {  // then fewer threads come
    }
    work.run();
    for (auto& other : others) other.join();
}

void run(Work& work, unsigned ranges) {
    run_on_threads(work, ranges);
    if (work.thrown) std::rethrow_exception(work.thrown);
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads, void* state, Body body) {
    if (count <= 0) return;
    const std::int64_t step = range_length(count, grain, threads);
    Work work{count, step, state, body};
    run(work, static_cast<unsigned>((count + step - 1) / step));
}

void parallel_units(std::int64_t count, std::int64_t unit, int threads, void* state, Body body) {
    if (count <= 0) return;
    threads = std::max(threads, 1);
    Work work{count, 0, state, body, unit, threads};
    run(work, static_cast<unsigned>(std::min<std::int64_t>(threads, count)));
}

void parallel_each(std::int64_t count, int threads, void* state,
                   void (*body)(void*, std::int64_t)) {
    if (count <= 0) return;
    struct Each {
        void* state;
        void (*body)(void*, std::int64_t);
    } each{state, body};
    Work work{count, 1, &each, [](void* all, std::int64_t index, std::int64_t) {
                  const Each& own = *static_cast<const Each*>(all);
                  own.body(own.state, index);
              }};
    run(work, static_cast<unsigned>(std::max<std::int64_t>(
                  std::min<std::int64_t>(threads, count), 1)));
}

}  // namespace fastlora
