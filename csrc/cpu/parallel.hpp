// A loop on the threads that the process already has.
#pragma once

#include <cstdint>

namespace fastlora {

// Calls body(state, first, last) over [0, count) cut into at most `threads` ranges of range_length,
// a multiple of `grain`; the last may be shorter. It runs on the pool of the OpenMP runtime that is loaded (torch's: a
// second pool would fight for the cores with it), and without one on threads of its own.
// What a body throws is thrown here when all have come back; of several, the first.
std::int64_t range_length(std::int64_t count, std::int64_t grain, int threads);

void parallel_for(std::int64_t count, std::int64_t grain, int threads, void* state,
                  void (*body)(void* state, std::int64_t first, std::int64_t last));

template <class Body>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Body& body) {
    parallel_for(count, grain, threads, const_cast<Body*>(&body),
                 [](void* state, std::int64_t first, std::int64_t last) {
                     (*static_cast<const Body*>(state))(first, last);
                 });
}

// The same, for work of which a thread that is held up should leave more to the others: whoever is
// free takes some of what is left, less and less, whole units while there are many, then halves.
void parallel_units(std::int64_t count, std::int64_t unit, int threads, void* state,
                    void (*body)(void* state, std::int64_t first, std::int64_t last));

template <class Body>
void parallel_units(std::int64_t count, std::int64_t unit, int threads, const Body& body) {
    parallel_units(count, unit, threads, const_cast<Body*>(&body),
                   [](void* state, std::int64_t first, std::int64_t last) {
                       (*static_cast<const Body*>(state))(first, last);
                   });
}

// Calls body(state, index) for every index below count, on at most `threads` threads: whoever is free
// takes the next, in order. For pieces of unequal length.
void parallel_each(std::int64_t count, int threads, void* state,
                   void (*body)(void* state, std::int64_t index));

template <class Body>
void parallel_each(std::int64_t count, int threads, const Body& body) {
    parallel_each(count, threads, const_cast<Body*>(&body), [](void* state, std::int64_t index) {
        (*static_cast<const Body*>(state))(index);
    });
}

}  // namespace fastlora
