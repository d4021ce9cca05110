// One thread pool with ggml-cpu: both use the process's OpenMP runtime, so no second pool spins beside it.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace actqkv {

// Whether the compiler had OpenMP; without it everything runs on the caller's thread.
#ifdef _OPENMP
constexpr bool has_threads = true;
#else
constexpr bool has_threads = false;
#endif

// Runs f(ith, nth) on nth = n_threads threads and waits for all. n_threads 1 stays on the caller's thread.
template <typename F> void parallel(int n_threads, F && f) {
#ifdef _OPENMP
    if (n_threads > 1) {
#pragma omp parallel num_threads(n_threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void) n_threads;
    f(0, 1);
}

} // namespace actqkv
