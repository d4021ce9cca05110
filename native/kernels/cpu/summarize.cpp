// summarize - what stands for a closed chunk of c keys (docs/algorithms.md 3.3; ActQKV, InfLLM).
//
//     rep_h = mean of the n_representatives keys of head h with the largest sums (ties to the lower index)
//
// per query head, per KV head with the sums of its group added up, or simply the mean of all keys per KV head; the
// mean also when fewer than n_representatives keys have a positive sum. Runs once per chunk and layer: small.
#include <math.h>

#include "half.h"
#include "ops.h"

namespace actqkv {

constexpr int KIND_HEAD = 0, KIND_MEAN = 2, KIND_BOUNDS = 3; // enum actqkv_summary; 1 is per KV head

static float attention(const float * sums, int64_t sum_stride, int n_sums, int32_t token) {
    float sum = 0;
    for (int h = 0; h < n_sums; h++) {
        const float s = sums[h * sum_stride + token];
        sum += isfinite(s) ? s : 0;
    }
    return sum;
}

// The n-th token in the order "larger sum first, then lower index"; -1 if fewer than n have a positive sum.
static int32_t nth_attended(const float * sums, int64_t sum_stride, int n_sums, int32_t c, int32_t n, float * value) {
    int32_t last = -1;
    *value = INFINITY;
    for (int32_t i = 0; i < n; i++) {
        int32_t best = -1;
        float best_value = 0;
        for (int32_t token = 0; token < c; token++) {
            const float s = attention(sums, sum_stride, n_sums, token);
            const bool follows = s < *value || (s == *value && token > last);
            if (follows && s > best_value) {
                best = token;
                best_value = s;
            }
        }
        if (best < 0) {
            return -1;
        }
        last = best;
        *value = best_value;
    }
    return last;
}

static void add_scalar(const actqkv_f16 * row, float * acc, int64_t n) {
    for (int64_t e = 0; e < n; e++) {
        acc[e] += half_to_float(row[e]);
    }
}

// rep [d] of one head from the sums of n_sums query heads; returns its squared length.
static double summarize_head(const ops * ops, int32_t n_representatives, const actqkv_f16 * keys, const float * sums,
                             int64_t sum_stride, int n_sums, int32_t d, int32_t c, actqkv_f16 * rep) {
    float least = 0;
    int32_t last = -1;
    if (n_sums > 0 && n_representatives > 0 && n_representatives < c) {
        last = nth_attended(sums, sum_stride, n_sums, c, n_representatives, &least);
    }
    double length2 = 0;
    constexpr int N = 256; // channels at a time, so that no memory is needed beside the stack
    for (int32_t e0 = 0; e0 < d; e0 += N) {
        const int32_t n = d - e0 < N ? d - e0 : N;
        float acc[N] = {0};
        for (int32_t token = 0; token < c; token++) {
            if (last >= 0) {
                const float s = attention(sums, sum_stride, n_sums, token);
                if (s < least || (s == least && token > last)) {
                    continue;
                }
            }
            (ops ? ops->add_f16 : add_scalar)(keys + (int64_t) token * d + e0, acc, n);
        }
        for (int32_t e = 0; e < n; e++) {
            rep[e0 + e] = float_to_half(acc[e] / (float) (last >= 0 ? n_representatives : c));
            const double x = half_to_float(rep[e0 + e]);
            length2 += x * x;
        }
    }
    return length2;
}

// Half precision bits as an integer of the same order, and back (the map is its own inverse).
static int16_t ordered(actqkv_f16 half) {
    const int16_t bits = (int16_t) half;
    return (int16_t) (bits ^ ((bits >> 15) & 0x7fff));
}

// Bounds of the c keys [c][d] of one KV head; exact, since keys are f16 already.
static void bound_keys(const actqkv_f16 * keys, int32_t d, int32_t c, actqkv_f16 * low, actqkv_f16 * high) {
    constexpr int N = 256; // channels at a time, as above
    for (int32_t e0 = 0; e0 < d; e0 += N) {
        const int32_t n = d - e0 < N ? d - e0 : N;
        int16_t lo[N], hi[N];
        for (int32_t e = 0; e < n; e++) {
            lo[e] = hi[e] = ordered(keys[e0 + e]);
        }
        for (int32_t token = 1; token < c; token++) {
            const actqkv_f16 * key = keys + (int64_t) token * d + e0;
            for (int32_t e = 0; e < n; e++) {
                const int16_t k = ordered(key[e]);
                lo[e] = k < lo[e] ? k : lo[e];
                hi[e] = k > hi[e] ? k : hi[e];
            }
        }
        for (int32_t e = 0; e < n; e++) {
            low[e0 + e] = (actqkv_f16) ordered((actqkv_f16) lo[e]);
            high[e0 + e] = (actqkv_f16) ordered((actqkv_f16) hi[e]);
        }
    }
}

} // namespace actqkv

extern "C" void actqkv_summarize(int32_t impl, int32_t kind, int32_t n_representatives, const actqkv_f16 * keys,
                                 int64_t key_stride, const float * sums, int64_t sum_stride, int32_t n_head,
                                 int32_t n_head_kv, int32_t d_head, int32_t c, actqkv_f16 * rep, float * norm) {
    if (kind == actqkv::KIND_BOUNDS) {
        actqkv_f16 * high = rep + (int64_t) n_head_kv * d_head;
        for (int32_t g = 0; g < n_head_kv; g++) {
            actqkv::bound_keys(keys + g * key_stride, d_head, c, rep + g * d_head, high + g * d_head);
        }
        *norm = 0.0f;
        return;
    }
    const actqkv::ops * ops = actqkv::ops_for(impl);
    const int32_t r = n_head / n_head_kv;
    const int32_t n_rep = kind == actqkv::KIND_HEAD ? n_head : n_head_kv;
    double length2 = 0;
    for (int32_t i = 0; i < n_rep; i++) {
        const int32_t g = kind == actqkv::KIND_HEAD ? i / r : i;
        const int32_t h = kind == actqkv::KIND_HEAD ? i : i * r;
        const int n_sums = kind == actqkv::KIND_HEAD ? 1 : kind == actqkv::KIND_MEAN ? 0 : r;
        const double part = actqkv::summarize_head(ops, n_representatives, keys + g * key_stride,
                                                   sums ? sums + h * sum_stride : nullptr, sum_stride,
                                                   sums ? n_sums : 0, d_head, c, rep + (int64_t) i * d_head);
        length2 += kind == actqkv::KIND_HEAD ? part : part * r;
    }
    *norm = (float) sqrt(length2);
}
