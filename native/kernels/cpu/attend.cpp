// attend - one softmax over everything a window sees (docs/algorithms.md sections 1 and 2).
//
//     l_ij  = scale * q_i . k_j      with the q and k that actqkv_span says
//     w_ij  = e^l_ij / sum_j e^l_ij  over all keys of all spans and the window's keys j <= i
//     out_i = sum_j w_ij v_j         weight_sums_hj = sum_i w_ij         span_mass = sum of w over span, queries / H
//
// The fast versions: attend_one.cpp for a window of one token, attend_window.cpp for more.
#include "attend.h"

#include <math.h>

#include "parallel.h"
#include "rows.h"

namespace actqkv {

static float dot(const float * q, int32_t type, const uint8_t * k, int32_t d) {
    float sum = 0;
    for (int32_t e = 0; e < d; e++) {
        sum += q[e] * row_value(type, k, e);
    }
    return sum;
}

// weights[j] of query i of head h: logits first, then the softmax. Returns the number of keys it sees.
static int64_t weigh_scalar(const actqkv_attend_args & a, int32_t h, int32_t i, float * weights) {
    const int32_t d = a.d_head, g = h / (a.n_head / a.n_head_kv);
    const float * q_near = a.q_near + ((int64_t) i * a.n_head + h) * d;
    const float * q_far = a.q_far + ((int64_t) i * a.n_head + h) * d;
    const float * q_turned = a.q_turned ? a.q_turned + ((int64_t) i * a.n_head + h) * d : nullptr;
    int64_t n = 0;
    for (int32_t s = 0; s < a.n_spans; s++) {
        const actqkv_span & span = span_of(a, g, s);
        const int64_t row = actqkv_row_bytes(span.kv_type, d);
        for (int32_t j = 0; j < span.n_tok; j++) {
            const bool is_near = span.near && (!span.far || a.n_past + i - (span.first + j) < a.n_clamp);
            const uint8_t * k = is_near ? span.near + g * span.near_stride : span.far + g * span.far_stride;
            const float * q = span.kv_type != ACTQKV_KV_F16 ? q_turned : is_near ? q_near : q_far;
            weights[n++] = a.scale * dot(q, span.kv_type, k + j * row, d);
        }
    }
    for (int32_t j = 0; j <= i; j++) {
        const actqkv_f16 * k = a.k_window + g * a.window_stride + (int64_t) j * d;
        weights[n++] = a.scale * dot(q_near, ACTQKV_KV_F16, (const uint8_t *) k, d);
    }
    float max = -INFINITY;
    for (int64_t j = 0; j < n; j++) {
        max = weights[j] > max ? weights[j] : max;
    }
    double sum = 0;
    for (int64_t j = 0; j < n; j++) {
        weights[j] = expf(weights[j] - max);
        sum += weights[j];
    }
    for (int64_t j = 0; j < n; j++) {
        weights[j] = (float) (weights[j] / sum);
    }
    return n;
}

static void mix_scalar(const actqkv_attend_args & a, int32_t h, int32_t i, const float * weights) {
    const int32_t d = a.d_head, g = h / (a.n_head / a.n_head_kv);
    float * out = a.out + ((int64_t) i * a.n_head + h) * d;
    for (int32_t e = 0; e < d; e++) {
        out[e] = 0;
    }
    for (int32_t s = 0; s <= a.n_spans; s++) {
        const bool window = s == a.n_spans;
        const actqkv_span * span = window ? nullptr : &span_of(a, g, s);
        const uint8_t * v =
            window ? (const uint8_t *) (a.v_window + g * a.window_stride) : span->v + g * span->v_stride;
        const int32_t n = window ? i + 1 : span->n_tok, type = window ? ACTQKV_KV_F16 : span->kv_type;
        const int64_t row = actqkv_row_bytes(type, d);
        for (int32_t j = 0; j < n; j++, weights++) {
            for (int32_t e = 0; e < d; e++) {
                out[e] += *weights * row_value(type, v + j * row, e);
            }
        }
    }
}

static void attend_scalar(const actqkv_attend_args & a) {
    const int64_t n_past_keys = count_past_keys(a, a.n_spans);
    const int64_t first_summed = count_past_keys(a, a.first_summed < a.n_spans ? a.first_summed : a.n_spans);
    clear_mass(a);
    // Heads add to the same masses: one thread then, so that the order of the sum is always the same.
    parallel(a.span_mass ? 1 : a.n_threads, [&](int ith, int nth) {
        float * weights = (float *) a.scratch + ith * (n_past_keys + a.m);
        for (int32_t h = a.n_head * ith / nth; h < a.n_head * (ith + 1) / nth; h++) {
            float * sums = a.weight_sums ? a.weight_sums + h * a.sum_stride - first_summed : nullptr;
            for (int64_t j = first_summed; sums && j < n_past_keys + a.m; j++) {
                sums[j] = 0;
            }
            for (int32_t i = 0; i < a.m; i++) {
                const int64_t n = weigh_scalar(a, h, i, weights);
                mix_scalar(a, h, i, weights);
                for (int64_t j = first_summed; sums && j < n; j++) {
                    sums[j] += weights[j];
                }
                double * mass = a.span_mass + h / (a.n_head / a.n_head_kv) * a.span_stride;
                for (int64_t s = 0, j = 0; a.span_mass && s < a.n_spans; s++) {
                    for (int32_t k = 0; k < a.spans[s].n_tok; k++) {
                        mass[s] += (double) weights[j++] / a.n_head;
                    }
                }
            }
        }
    });
}

} // namespace actqkv

extern "C" uint64_t actqkv_attend_scratch(int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t m, int64_t n_keys,
                                          int32_t n_threads) {
    uint64_t size = (uint64_t) n_keys * n_threads * sizeof(float); // attend_scalar
    const uint64_t one = actqkv::attend_one_scratch(n_head, n_head_kv, d_head, n_keys, n_threads);
    const uint64_t window = actqkv::attend_window_scratch(n_head, n_head_kv, d_head, m, n_keys, n_threads);
    size = size > one ? size : one;
    return size > window ? size : window;
}

extern "C" void actqkv_attend(int32_t impl, const actqkv_attend_args * args) {
    const actqkv::ops * ops = actqkv::ops_for(impl);
    if (!ops) {
        actqkv::attend_scalar(*args);
    } else if (args->m == 1) {
        actqkv::attend_one(*ops, *args);
    } else {
        actqkv::attend_window(*ops, *args);
    }
}
