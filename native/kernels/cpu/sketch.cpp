// sketch - a chunk's keys in about one bit per channel, to score many candidates where their keys would be too much to
// read: the mean of the keys of one KV head, and of each key the signs of what is left, times their mean size.
//
//     mu = mean_j k_j      m_j = mean_e |k_je - mu_e|      k'_j = mu + m_j sign(k_j - mu)
//     score_b = scale * max_j q . k'_j = scale * (q . mu + max_j m_j sum_e +-q_e)
//
// Signs lie by fours of channels, so that the sum over e is d/4 lookups: table p of a query holds +-q_4p .. +-q_(4p+3)
// for each of the 16 patterns, as whole multiples of 1/63 of the largest. Reads the candidates' sketches once:
// memory-bound. The idea of fours and tables in registers: Andre et al. 2015 (VLDB), for product quantisation.
//
// Layout, of one KV head: f16 mu[d], f16 m[C], u8 signs[d/8][C] with channel 8i+e in bit e of row i; set: not negative.
// C is c rounded up to 32; what is beyond c repeats the last key.
#include <math.h>

#include "half.h"
#include "ops.h"
#include "parallel.h"

namespace actqkv {
namespace {

constexpr int N_HEADS = 8;     // query heads at a time, so that no memory is needed beside the stack
constexpr int MAX_D = 1024;    // head dimensions with tables on the stack
constexpr int TABLE = 16;      // patterns of four signs
constexpr float GREATEST = 63; // of a table: two entries add up within a signed byte

int64_t padded(int64_t c) { return (c + SKETCH_KEYS - 1) / SKETCH_KEYS * SKETCH_KEYS; }

// Tables [d/4][16] of a query, and what an entry of 1 stands for.
float make_tables(const float * q, int32_t d, int8_t * tables) {
    float most = 0;
    for (int32_t p = 0; p < d; p += 4) {
        const float sum = fabsf(q[p]) + fabsf(q[p + 1]) + fabsf(q[p + 2]) + fabsf(q[p + 3]);
        most = sum > most ? sum : most;
    }
    const float inverse = most > 0 && isfinite(most) ? GREATEST / most : 0;
    for (int32_t p = 0; p < d; p += 4) {
        for (int pattern = 0; pattern < TABLE; pattern++) {
            float sum = 0;
            for (int e = 0; e < 4; e++) {
                sum += pattern >> e & 1 ? q[p + e] : -q[p + e];
            }
            tables[p / 4 * TABLE + pattern] = (int8_t) (inverse > 0 ? lrintf(sum * inverse) : 0);
        }
    }
    return inverse > 0 ? 1 / inverse : 0;
}

// best[x] = max over the C keys of m_j times the sum of their entries in tables x
void best_scalar(const int8_t * tables, int n_vec, const uint8_t * sizes, const uint8_t * signs, int32_t d, int32_t n,
                 float * best) {
    for (int x = 0; x < n_vec; x++) {
        const int8_t * table = tables + (int64_t) x * d / 4 * TABLE;
        best[x] = -INFINITY;
        for (int32_t j = 0; j < n; j++) {
            int sum = 0;
            for (int32_t i = 0; i < d / 8; i++) {
                const int byte = signs[(int64_t) i * n + j];
                sum += table[2 * i * TABLE + (byte & 15)] + table[(2 * i + 1) * TABLE + (byte >> 4)];
            }
            const float score = load_half(sizes + 2 * j) * (float) sum;
            best[x] = score > best[x] ? score : best[x];
        }
    }
}

void mean_scalar(const float * queries, int n_vec, const uint8_t * mean, int32_t d, float * out) {
    for (int x = 0; x < n_vec; x++) {
        double sum = 0;
        for (int32_t e = 0; e < d; e++) {
            sum += (double) queries[(int64_t) x * d + e] * load_half(mean + 2 * e);
        }
        out[x] = (float) sum;
    }
}

// out[x] = scale * the best sketched key for n_vec <= N_HEADS queries of one KV head
void score_head(const ops * op, const float * queries, const int8_t * tables, const float * steps, int n_vec,
                const uint8_t * sketch, int32_t d, int32_t n, float scale, float * out, int64_t ldo) {
    const uint8_t *sizes = sketch + 2 * d, *signs = sizes + 2 * n;
    float best[N_HEADS];
    (op ? op->sketch_best : best_scalar)(tables, n_vec, sizes, signs, d, n, best);
    float mean[N_HEADS];
    if (op) {
        op->f16.dots(queries, n_vec, sketch, 1, d, mean, 1, nullptr);
    } else {
        mean_scalar(queries, n_vec, sketch, d, mean);
    }
    for (int x = 0; x < n_vec; x++) {
        out[x * ldo] = scale * (mean[x] + steps[x] * best[x]);
    }
}

} // namespace
} // namespace actqkv

extern "C" int64_t actqkv_sketch_bytes(int32_t d_head, int32_t c) {
    const bool has_one = d_head % 8 == 0 && d_head <= actqkv::MAX_D;
    return has_one ? 2 * d_head + (2 + d_head / 8) * actqkv::padded(c) : 0;
}

extern "C" void actqkv_sketch(const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head, int32_t c,
                              uint8_t * sketches) {
    const int64_t n = actqkv::padded(c), bytes = actqkv_sketch_bytes(d_head, c);
    for (int32_t g = 0; g < n_head_kv; g++, sketches += bytes) {
        const actqkv_f16 * from = keys + g * key_stride;
        float mean[actqkv::MAX_D] = {0};
        for (int64_t i = 0; i < (int64_t) c * d_head; i++) {
            mean[i % d_head] += half_to_float(from[i]) / (float) c;
        }
        for (int32_t e = 0; e < d_head; e++) {
            store_half(mean[e], sketches + 2 * e);
        }
        uint8_t *sizes = sketches + 2 * d_head, *signs = sizes + 2 * n;
        memset(signs, 0, d_head / 8 * n);
        for (int64_t j = 0; j < n; j++) {
            const actqkv_f16 * key = from + (j < c ? j : c - 1) * d_head;
            float size = 0;
            for (int32_t e = 0; e < d_head; e++) {
                const float rest = half_to_float(key[e]) - mean[e];
                size += fabsf(rest);
                signs[e / 8 * n + j] |= (uint8_t) (!(rest < 0) << e % 8);
            }
            store_half(size / (float) d_head, sizes + 2 * j);
        }
    }
}

extern "C" void actqkv_sketch_scores(int32_t impl, const float * query, const uint8_t * sketches,
                                     const int32_t * chunks, int32_t n, int32_t n_head, int32_t n_head_kv,
                                     int32_t d_head, int32_t c, float scale, float * scores, int32_t n_threads) {
    using namespace actqkv;
    const ops * op = ops_for(impl);
    const int32_t r = n_head / n_head_kv, n_keys = (int32_t) padded(c);
    const int64_t bytes = actqkv_sketch_bytes(d_head, c);
    parallel(n_threads, [=](int ith, int nth) {
        const int32_t from = (int32_t) ((int64_t) n * ith / nth), to = (int32_t) ((int64_t) n * (ith + 1) / nth);
        for (int32_t h = 0, n_vec; from < to && h < n_head; h += n_vec) {
            const int32_t rest = r - h % r; // of this group
            n_vec = rest < N_HEADS ? rest : N_HEADS;
            alignas(64) int8_t tables[N_HEADS * MAX_D / 4 * TABLE];
            float steps[N_HEADS];
            for (int x = 0; x < n_vec; x++) {
                steps[x] =
                    make_tables(query + (int64_t) (h + x) * d_head, d_head, tables + (int64_t) x * d_head / 4 * TABLE);
            }
            const uint8_t * group = sketches + h / r * bytes;
            for (int32_t i = from; i < to; i++) {
                if (i + 1 < to) {
                    const uint8_t * next = group + chunks[i + 1] * n_head_kv * bytes;
                    for (int64_t at = 0; at < bytes; at += 64) { // a cache line
                        __builtin_prefetch(next + at);
                    }
                }
                score_head(op, query + (int64_t) h * d_head, tables, steps, n_vec,
                           group + chunks[i] * n_head_kv * bytes, d_head, n_keys, scale, scores + (int64_t) h * n + i,
                           n);
            }
        }
    });
}
