// vote - one list of chunks per KV head, chosen by its group's query heads (ALGORITHMS.md section 4; Quest).
//
//     s_hb = q_h . rep_b                                        bounds: q_h in two parts, so that this is Quest's bound
//     vote_gb = max over h in group g of  ln softmax_b(s_h)_b = s_hb - ln sum_b e^s_hb
//     vote_gb = ln sum over h in group g of  e^(s_hb - ln sum_b e^s_hb)                    the variant
//
// Reads the summaries once for all query heads of a group: memory-bound.
#include <math.h>

#include "half.h"
#include "ops.h"
#include "parallel.h"

namespace actqkv {
namespace {

void dots_scalar(const float * queries, int32_t n_queries, const actqkv_f16 * rows, int64_t n, int64_t width,
                 float * scores, int64_t stride) {
    for (int32_t h = 0; h < n_queries; h++) {
        for (int64_t b = 0; b < n; b++) {
            double sum = 0;
            for (int64_t e = 0; e < width; e++) {
                sum += (double) queries[h * width + e] * half_to_float(rows[b * width + e]);
            }
            scores[h * stride + b] = (float) sum;
        }
    }
}

// ln sum_b e^scores_b
double log_sum(const ops * op, const float * scores, int64_t n) {
    float most = scores[0];
    for (int64_t b = 1; b < n; b++) {
        most = scores[b] > most ? scores[b] : most;
    }
    double z = 0, zx;
    if (op) {
        op->exp_moments(scores, n, most, 1.0f, &z, &zx);
    } else {
        for (int64_t b = 0; b < n; b++) {
            z += exp((double) scores[b] - most);
        }
    }
    return most + log(z);
}

// vote <- max(vote, x), or ln(e^vote + e^x)
float join(float vote, float x, bool sum) {
    const float most = vote > x ? vote : x;
    return sum ? most + log1pf(expf((vote > x ? x : vote) - most)) : most;
}

} // namespace
} // namespace actqkv

extern "C" void actqkv_head_scores(int32_t impl, const float * queries, const actqkv_f16 * reps, int64_t block_stride,
                                   int32_t n_blocks, int64_t n, int64_t width, int32_t n_head, float * scores,
                                   int32_t n_threads) {
    const actqkv::ops * op = actqkv::ops_for(impl);
    const int32_t r = n_head / n_blocks;
    actqkv::parallel(n_threads, [=](int ith, int nth) {
        const int64_t from = n * ith / nth, to = n * (ith + 1) / nth;
        for (int32_t i = 0; i < n_blocks; i++) {
            const actqkv_f16 * rows = reps + i * block_stride + from * width;
            const float * group = queries + (int64_t) i * r * width;
            float * out = scores + (int64_t) i * r * n + from;
            if (op) {
                op->f16.dots(group, r, rows, to - from, width, out, n, nullptr);
            } else {
                actqkv::dots_scalar(group, r, rows, to - from, width, out, n);
            }
        }
    });
}

extern "C" void actqkv_vote(int32_t impl, const float * scores, int64_t n, int32_t n_head, int32_t n_head_kv,
                            int32_t sum, float * votes, int32_t n_threads) {
    const actqkv::ops * op = actqkv::ops_for(impl);
    const int32_t r = n_head / n_head_kv;
    actqkv::parallel(n_threads, [=](int ith, int nth) {
        for (int32_t g = n_head_kv * ith / nth; n > 0 && g < n_head_kv * (ith + 1) / nth; g++) {
            float * vote = votes + g * n;
            for (int32_t x = 0; x < r; x++) {
                const float * score = scores + (int64_t) (g * r + x) * n;
                const float shift = (float) actqkv::log_sum(op, score, n);
                for (int64_t b = 0; b < n; b++) {
                    vote[b] = x == 0 ? score[b] - shift : actqkv::join(vote[b], score[b] - shift, sum != 0);
                }
            }
        }
    });
}
