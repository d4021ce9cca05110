// refine - the score of a chunk by its keys themselves, for the few chunks that a cheaper score proposed.
//
//     score_b = sum over query heads h of max over keys j of the chunk of q_h . k_j
//
// Quest's bound (ALGORITHMS.md section 4) is an upper bound of exactly this sum. Reads the candidates' keys once:
// n*c*G rows, memory-bound.
#include <math.h>

#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace actqkv {
namespace {

constexpr int N_KEYS = 64;  // keys at a time, so that no memory is needed beside the stack
constexpr int N_HEADS = 16; // query heads at a time

void dots_scalar(const float * queries, int n_vec, int32_t type, const uint8_t * keys, int64_t n, int64_t d,
                 float * out, int64_t ldo) {
    const int64_t row = actqkv_row_bytes(type, d);
    for (int x = 0; x < n_vec; x++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t e = 0; e < d; e++) {
                sum += (double) queries[x * d + e] * row_value(type, keys + j * row, e);
            }
            out[x * ldo + j] = (float) sum;
        }
    }
}

float max_scalar(const float * x, int32_t n) {
    float most = x[0];
    for (int32_t i = 1; i < n; i++) {
        most = x[i] > most ? x[i] : most;
    }
    return most;
}

// Sum over n_vec <= N_HEADS query heads of the best of c keys.
float best_keys(const ops * op, const float * queries, int n_vec, int32_t type, const uint8_t * keys, int32_t c,
                int32_t d, const uint8_t * ahead) {
    const int64_t row = actqkv_row_bytes(type, d);
    float best[N_HEADS];
    for (int x = 0; x < n_vec; x++) {
        best[x] = -INFINITY;
    }
    for (int32_t from = 0; from < c; from += N_KEYS) {
        const int32_t n = c - from < N_KEYS ? c - from : N_KEYS;
        const uint8_t * rows = keys + from * row;
        float dots[N_HEADS * N_KEYS];
        if (op) {
            op->of(type).dots(queries, n_vec, rows, n, d, dots, N_KEYS, ahead ? ahead + from * row : nullptr);
        } else {
            dots_scalar(queries, n_vec, type, rows, n, d, dots, N_KEYS);
        }
        for (int x = 0; x < n_vec; x++) {
            const float most = op ? op->max(dots + x * N_KEYS, n) : max_scalar(dots + x * N_KEYS, n);
            best[x] = most > best[x] ? most : best[x];
        }
    }
    float sum = 0;
    for (int x = 0; x < n_vec; x++) {
        sum += best[x];
    }
    return sum;
}

} // namespace
} // namespace actqkv

extern "C" void actqkv_refine(int32_t impl, const float * query, int32_t type, const uint8_t * keys,
                              const int32_t * chunks, int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head,
                              int32_t c, float * scores, int32_t n_threads) {
    const actqkv::ops * op = actqkv::ops_for(impl);
    const int32_t r = n_head / n_head_kv;
    const int64_t tile = c * actqkv_row_bytes(type, d_head), chunk_bytes = n_head_kv * tile;
    actqkv::parallel(n_threads, [=](int ith, int nth) {
        for (int32_t i = (int32_t) ((int64_t) n * ith / nth); i < (int64_t) n * (ith + 1) / nth; i++) {
            const uint8_t * chunk = keys + chunks[i] * chunk_bytes;
            const uint8_t * next = i + 1 < n ? keys + chunks[i + 1] * chunk_bytes : nullptr;
            float sum = 0;
            for (int32_t h = 0, n_vec; h < n_head; h += n_vec) {
                const int32_t g = h / r, rest = r - h % r; // of this group
                n_vec = rest < actqkv::N_HEADS ? rest : actqkv::N_HEADS;
                sum += actqkv::best_keys(op, query + (int64_t) h * d_head, n_vec, type, chunk + g * tile, c, d_head,
                                         next ? next + g * tile : nullptr);
            }
            scores[i] = sum;
        }
    });
}
