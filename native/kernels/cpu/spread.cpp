// spread - a summary of a chunk's keys in little more than four bits per channel: their mean, and one number per KV head
// for how far they spread around it.
//
//     mu = mean_j k_j      s^2 = mean over keys j and channels e of (k_je - mu_e)^2
//     score_b = sum over query heads h of  q_h . (mu - centre) + s |q_h|_1
//
// which is the greatest product with any point of a box of half-width s around mu, less what all chunks share: Quest's bound
// (docs/algorithms.md, 4) for a box of the keys' own, as large as most of them need instead of all. All vectors are turned
// (kernels.h), so that four bits hold them alike; mu - centre is rounded to q4_0.
//
// Layout: per KV head ceil(d / 32) blocks of q4_0 (rows.h), filled up with zeros; then f16 s[G]. Reads what it scores once:
// memory-bound.
#include <math.h>

#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace actqkv {
namespace {

constexpr int MAX_D = 1024; // head dimensions with a mean on the stack

int64_t blocks_of_head(int32_t d) { return (d + BLOCK - 1) / BLOCK; }
int64_t means_bytes(int32_t n_head_kv, int32_t d) { return n_head_kv * blocks_of_head(d) * Q4_BYTES; }

// x [d] as head g's part of a spread; x has room for whole blocks.
void store_head(float * x, int32_t d, double variance, int32_t n_head_kv, int32_t g, uint8_t * spread) {
    const int64_t n_blocks = blocks_of_head(d);
    memset(x + d, 0, (n_blocks * BLOCK - d) * sizeof(float));
    for (int64_t b = 0; b < n_blocks; b++) {
        store_q4_0(x + b * BLOCK, spread + (g * n_blocks + b) * Q4_BYTES);
    }
    store_half((float) sqrt(variance), spread + means_bytes(n_head_kv, d) + 2 * g);
}

float score_scalar(const float * folded, int32_t n_head_kv, int32_t d, const uint8_t * spread) {
    const int64_t n = n_head_kv * blocks_of_head(d) * BLOCK, tail = means_bytes(n_head_kv, d);
    double sum = 0;
    for (int64_t e = 0; e < n; e++) {
        sum += (double) folded[e] * row_value(ACTQKV_KV_Q4_0, spread, e);
    }
    for (int32_t g = 0; g < n_head_kv; g++) {
        sum += (double) folded[n + g] * load_half(spread + tail + 2 * g);
    }
    return (float) sum;
}

} // namespace
} // namespace actqkv

extern "C" int64_t actqkv_spread_bytes(int32_t n_head_kv, int32_t d_head) {
    return d_head <= actqkv::MAX_D ? actqkv::means_bytes(n_head_kv, d_head) + 2 * (int64_t) n_head_kv : 0;
}

extern "C" void actqkv_mean(const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head, int32_t c,
                            float * mean) {
    for (int32_t g = 0; g < n_head_kv; g++, mean += d_head) {
        memset(mean, 0, d_head * sizeof(float));
        const actqkv_f16 * key = keys + g * key_stride;
        for (int32_t j = 0; j < c; j++, key += d_head) {
            for (int32_t e = 0; e < d_head; e++) {
                mean[e] += half_to_float(key[e]);
            }
        }
        for (int32_t e = 0; c > 0 && e < d_head; e++) {
            mean[e] /= (float) c;
        }
    }
}

extern "C" void actqkv_spread(const actqkv_f16 * keys, int64_t key_stride, const float * centre, int32_t n_head_kv,
                              int32_t d_head, int32_t c, uint8_t * spread) {
    using namespace actqkv;
    for (int32_t g = 0; g < n_head_kv; g++) {
        const actqkv_f16 * from = keys + g * key_stride;
        float mean[MAX_D];
        actqkv_mean(from, 0, 1, d_head, c, mean);
        double squares = 0;
        for (int32_t j = 0; j < c; j++) {
            for (int32_t e = 0; e < d_head; e++) {
                const float rest = half_to_float(from[(int64_t) j * d_head + e]) - mean[e];
                squares += rest * rest;
            }
        }
        for (int32_t e = 0; e < d_head; e++) {
            mean[e] -= centre[(int64_t) g * d_head + e];
        }
        actqkv_turn(mean, 1, d_head);
        store_head(mean, d_head, squares / ((double) c * d_head), n_head_kv, g, spread);
    }
}

extern "C" int64_t actqkv_spread_query_size(int32_t n_head_kv, int32_t d_head) {
    return n_head_kv * (actqkv::blocks_of_head(d_head) * actqkv::BLOCK + 1);
}

extern "C" void actqkv_spread_query(const float * query, int32_t n_head, int32_t n_head_kv, int32_t d_head,
                                    float * folded) {
    using namespace actqkv;
    const int32_t r = n_head / n_head_kv;
    const int64_t padded = blocks_of_head(d_head) * BLOCK;
    float * reach = folded + n_head_kv * padded;
    memset(folded, 0, actqkv_spread_query_size(n_head_kv, d_head) * sizeof(float));
    for (int32_t h = 0; h < n_head; h++) {
        float turned[MAX_D];
        memcpy(turned, query + (int64_t) h * d_head, d_head * sizeof(float));
        actqkv_turn(turned, 1, d_head);
        for (int32_t e = 0; e < d_head; e++) {
            folded[h / r * padded + e] += turned[e];
            reach[h / r] += fabsf(turned[e]);
        }
    }
}

extern "C" void actqkv_spread_scores(int32_t impl, const float * folded, const uint8_t * spreads, int64_t n,
                                     int32_t n_head_kv, int32_t d_head, float * scores, int32_t n_threads) {
    using namespace actqkv;
    const ops * op = ops_for(impl);
    const int64_t n_blocks = n_head_kv * blocks_of_head(d_head), bytes = actqkv_spread_bytes(n_head_kv, d_head);
    const float * reach = folded + n_blocks * BLOCK;
    parallel(n_threads, [=](int ith, int nth) {
        const int64_t from = n * ith / nth, to = n * (ith + 1) / nth;
        if (op) {
            op->spread_scores(folded, n_blocks, reach, n_head_kv, spreads + from * bytes, to - from, scores + from);
            return;
        }
        for (int64_t i = from; i < to; i++) {
            scores[i] = score_scalar(folded, n_head_kv, d_head, spreads + i * bytes);
        }
    });
}
