// vote - one list of chunks per KV head, chosen by its group's query heads (docs/algorithms.md section 4; Quest).
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

constexpr int32_t N_HEADS = 32;   // query heads at a time, and ...
constexpr int64_t N_CHUNKS = 256; // ... chunks, so that no memory is needed beside the stack

// ln sum_b e^scores_b
float log_sum(const ops * op, const float * scores, int64_t n) {
    if (op) {
        const float most = op->max(scores, n);
        return most + logf(op->exp_sum(scores, n, most));
    }
    float most = scores[0];
    for (int64_t b = 1; b < n; b++) {
        most = scores[b] > most ? scores[b] : most;
    }
    double z = 0;
    for (int64_t b = 0; b < n; b++) {
        z += exp((double) scores[b] - most);
    }
    return (float) (most + log(z));
}

// ops::join_exps
void join_scalar(const float * scores, int64_t lds, int n_vec, const float * shifts, int64_t n, float * most,
                 float * sums) {
    for (int64_t b = 0; b < n; b++) {
        const float before = most[b];
        for (int x = 0; x < n_vec; x++) {
            const float score = scores[x * lds + b] - shifts[x];
            most[b] = score > most[b] ? score : most[b];
        }
        double sum = exp((double) before - most[b]);
        for (int x = 0; x < n_vec; x++) {
            sum += exp((double) scores[x * lds + b] - shifts[x] - most[b]);
        }
        sums[b] = (float) sum;
    }
}

// votes [n] of r query heads, scores [r][n]
void vote_group(const ops * op, const float * scores, int64_t n, int32_t r, bool sum, float * votes) {
    for (int64_t b = 0; b < n; b++) {
        votes[b] = -INFINITY;
    }
    for (int32_t x = 0; x < r; x += N_HEADS) {
        const int32_t n_vec = r - x < N_HEADS ? r - x : N_HEADS;
        float shifts[N_HEADS], sums[N_CHUNKS];
        for (int32_t i = 0; i < n_vec; i++) {
            shifts[i] = log_sum(op, scores + (x + i) * n, n);
        }
        for (int64_t b = 0; b < n; b += N_CHUNKS) {
            const int64_t n_here = n - b < N_CHUNKS ? n - b : N_CHUNKS;
            (op ? op->join_exps : join_scalar)(scores + x * n + b, n, n_vec, shifts, n_here, votes + b, sums);
            for (int64_t i = 0; sum && i < n_here; i++) {
                votes[b + i] += logf(sums[i]);
            }
        }
    }
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
            actqkv::vote_group(op, scores + (int64_t) g * r * n, n, r, sum != 0, votes + g * n);
        }
    });
}
