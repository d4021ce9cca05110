// score - how well each chunk's summary answers the probe (docs/algorithms.md 3.4; ActQKV, InfLLM).
//
//     score_b = scale * probe . rep_b                              dot product
//     score_b = scale * probe . rep_b / (norm_b * probe_norm)      cosine; 0 where the divisor is 0 or not finite
//
// Reads 2*n*width bytes once: memory-bound.
#include <math.h>

#include "half.h"
#include "ops.h"
#include "parallel.h"

namespace actqkv {

static void score_scalar(const float * probe, const actqkv_f16 * reps, int64_t n, int64_t width, float * scores) {
    for (int64_t b = 0; b < n; b++) {
        double sum = 0;
        for (int64_t e = 0; e < width; e++) {
            sum += (double) probe[e] * half_to_float(reps[b * width + e]);
        }
        scores[b] = (float) sum;
    }
}

static void score_finish(float probe_norm, const float * norms, int64_t n, float scale, float * scores) {
    for (int64_t b = 0; b < n; b++) {
        float factor = scale;
        if (norms) {
            const float divisor = norms[b] * probe_norm;
            factor = divisor > 0 && isfinite(divisor) ? scale / divisor : 0;
        }
        scores[b] = factor == 0 ? 0 : scores[b] * factor;
    }
}

} // namespace actqkv

extern "C" void actqkv_score(int32_t impl, const float * probe, float probe_norm, const actqkv_f16 * reps,
                             const float * norms, int64_t n, int64_t width, float scale, float * scores,
                             int32_t n_threads) {
    const actqkv::ops * ops = actqkv::ops_for(impl);
    actqkv::parallel(n_threads, [=](int ith, int nth) {
        const int64_t from = n * ith / nth;
        const int64_t to = n * (ith + 1) / nth;
        const actqkv_f16 * rows = reps + from * width;
        if (ops) {
            ops->f16.dots(probe, 1, rows, to - from, width, scores + from, n, nullptr);
        } else {
            actqkv::score_scalar(probe, rows, to - from, width, scores + from);
        }
        actqkv::score_finish(probe_norm, norms ? norms + from : nullptr, to - from, scale, scores + from);
    });
}
