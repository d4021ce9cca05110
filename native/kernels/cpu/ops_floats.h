// Rows of floats: greatest, sums, exponentials, statistics (ops.h). Included once per instruction set; all static.
#pragma once

#include "simd.h"

static float simd_max(const float * x, int64_t n) {
    vf a = v_set1(-__builtin_inff()), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a = v_max(a, v_load(x + i));
        b = v_max(b, v_load(x + i + W));
    }
    float greatest = v_greatest(v_max(a, b));
    for (; i < n; i++) {
        greatest = x[i] > greatest ? x[i] : greatest;
    }
    return greatest;
}

static float simd_exp2_sum(float * x, int64_t n, float shift) {
    const vf s = v_set1(shift);
    vf a = v_zero(), b = v_zero();
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vf y = v_exp2(v_sub(v_load(x + i), s));
        const vf z = v_exp2(v_sub(v_load(x + i + W), s));
        v_store(x + i, y);
        v_store(x + i + W, z);
        a = v_add(a, y);
        b = v_add(b, z);
    }
    for (; i < n; i += W) {
        const int left = n - i < W ? (int) (n - i) : W;
        const vf y = v_exp2(v_sub(v_load_n(x + i, left, -__builtin_inff()), s));
        v_store_n(x + i, y, left);
        a = v_add(a, y);
    }
    return v_sum(v_add(a, b));
}

constexpr float LOG2_E = 1.44269504f;

// The lanes that an array's end leaves over are `fill`.
static inline vf v_load_end(const float * p, int64_t left, float fill) {
    return left >= W ? v_load(p) : v_load_n(p, (int) left, fill);
}

static float simd_exp_sum(const float * x, int64_t n, float shift) {
    const vf s = v_set1(shift), log2_e = v_set1(LOG2_E);
    vf sum = v_zero();
    for (int64_t i = 0; i < n; i += W) {
        sum = v_add(sum, v_exp2(v_mul(v_sub(v_load_end(x + i, n - i, -__builtin_inff()), s), log2_e)));
    }
    return v_sum(sum);
}

static void simd_join_exps(const float * scores, int64_t lds, int n_vec, const float * shifts, int64_t n, float * most,
                           float * sums) {
    const vf log2_e = v_set1(LOG2_E);
    for (int64_t i = 0; i < n; i += W) {
        const int64_t left = n - i;
        const vf before = v_load_end(most + i, left, 0);
        vf greatest = before;
        for (int x = 0; x < n_vec; x++) {
            const vf score = v_sub(v_load_end(scores + x * lds + i, left, 0), v_set1(shifts[x]));
            greatest = v_max(greatest, score);
        }
        vf sum = v_exp2(v_mul(v_sub(before, greatest), log2_e));
        for (int x = 0; x < n_vec; x++) {
            const vf score = v_sub(v_load_end(scores + x * lds + i, left, 0), v_set1(shifts[x]));
            sum = v_add(sum, v_exp2(v_mul(v_sub(score, greatest), log2_e)));
        }
        if (left >= W) {
            v_store(most + i, greatest);
            v_store(sums + i, sum);
        } else {
            v_store_n(most + i, greatest, (int) left);
            v_store_n(sums + i, sum, (int) left);
        }
    }
}

static bool simd_limits(const float * x, int64_t n, float * least, float * greatest) {
    const vf infinite = v_set1(__builtin_inff()), minus = v_set1(-__builtin_inff());
    constexpr uint32_t ALL = (1u << W) - 1;
    vf low = infinite, high = minus;
    uint32_t numbers = ALL;
    for (int64_t i = 0; i < n; i += W) {
        const vf y = v_load_end(x + i, n - i, x[0]);
        low = v_min(low, y);
        high = v_max(high, y);
        numbers &= v_within(y, minus, infinite);
    }
    *least = -v_greatest(v_sub(v_zero(), low));
    *greatest = v_greatest(high);
    return numbers == ALL;
}

static bool simd_greatest_of_columns(const float * x, int64_t n, int64_t width, float * most) {
    const vf infinite = v_set1(__builtin_inff()), minus = v_set1(-__builtin_inff());
    constexpr uint32_t ALL = (1u << W) - 1;
    uint32_t numbers = ALL;
    for (int64_t from = 0; from < n; from += width) {
        const int64_t n_here = n - from < width ? n - from : width;
        for (int64_t b = 0; b < n_here; b += W) {
            const int64_t left = n_here - b;
            vf y = v_load_end(x + from + b, left, -__builtin_inff());
            numbers &= v_within(y, minus, infinite);
            y = from > 0 ? v_max(y, v_load_end(most + b, left, -__builtin_inff())) : y;
            if (left >= W) {
                v_store(most + b, y);
            } else {
                v_store_n(most + b, y, (int) left);
            }
        }
    }
    return numbers == ALL;
}

static int64_t simd_find(const float * x, int64_t n, float low, float high, int32_t * found) {
    const vf from = v_set1(low), to = v_set1(high);
    int64_t n_found = 0;
    for (int64_t i = 0; i < n; i += W) {
        const uint32_t within = v_within(v_load_end(x + i, n - i, __builtin_nanf("")), from, to);
        if (i + W <= n) { // there is room for all of a vector
            n_found += v_store_lanes(found + n_found, within, (int32_t) i);
            continue;
        }
        for (uint32_t left = within; left != 0; left &= left - 1) {
            found[n_found++] = (int32_t) i + __builtin_ctz(left);
        }
    }
    return n_found;
}

static float simd_sum(const float * x, int64_t n) {
    vf a = v_zero();
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        a = v_add(a, v_load(x + i));
    }
    float sum = v_sum(a);
    for (; i < n; i++) {
        sum += x[i];
    }
    return sum;
}

static void simd_add_scaled(float * dst, const float * src, int64_t n, float factor) {
    const vf f = v_set1(factor);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        v_store(dst + i, v_fma(f, v_load(src + i), v_load(dst + i)));
    }
    for (; i < n; i++) {
        dst[i] += factor * src[i];
    }
}

static void simd_scale(float * dst, int64_t n, float factor) {
    const vf f = v_set1(factor);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        v_store(dst + i, v_mul(f, v_load(dst + i)));
    }
    for (; i < n; i++) {
        dst[i] *= factor;
    }
}

// Rows outside, channels inside: a column of a wide matrix falls into few cache sets.
static void simd_column_stats(const float * z, int64_t ldz, int32_t m, int64_t n, float * mean, float * var) {
    for (int64_t e = 0; e < n; e++) {
        mean[e] = var[e] = 0;
    }
    for (int32_t i = 0; i < m; i++) {
        simd_add_scaled(mean, z + i * ldz, n, 1);
    }
    simd_scale(mean, n, 1 / (float) m);
    for (int32_t i = 0; i < m; i++) {
        const float * row = z + i * ldz;
        int64_t e = 0;
        for (; e + W <= n; e += W) {
            const vf delta = v_sub(v_load(row + e), v_load(mean + e));
            v_store(var + e, v_fma(delta, delta, v_load(var + e)));
        }
        for (; e < n; e++) {
            var[e] += (row[e] - mean[e]) * (row[e] - mean[e]);
        }
    }
    simd_scale(var, n, 1 / (float) m);
}

static float simd_weighted_distance(const float * z, const float * mean, const float * inv, int64_t n) {
    vf a = v_zero();
    int64_t e = 0;
    for (; e + W <= n; e += W) {
        const vf delta = v_sub(v_load(z + e), v_load(mean + e));
        a = v_fma(v_mul(delta, delta), v_load(inv + e), a);
    }
    float sum = v_sum(a);
    for (; e < n; e++) {
        sum += (z[e] - mean[e]) * (z[e] - mean[e]) * inv[e];
    }
    return sum;
}

// Lanes are added up every few vectors, so that sums in float stay short.
static void simd_exp_moments(const float * scores, int64_t n, float shift, float factor, double * z, double * zx) {
    constexpr int64_t STEP = 16 * W;
    const vf log2_e = v_set1(LOG2_E), none = v_zero();
    *z = *zx = 0;
    for (int64_t from = 0; from < n; from += STEP) {
        vf sum = none, weighted = none;
        int64_t missing = 0; // lanes beyond the end: x = 0 there, e^x = 1, x e^x = 0
        for (int64_t i = from; i < n && i < from + STEP; i += W) {
            const vf s = v_load_end(scores + i, n - i, shift);
            // No less than where e^x is 0: infinity times 0 is no number.
            const vf x = v_max(v_mul(v_sub(s, v_set1(shift)), v_set1(factor)), v_set1(-127));
            const vf y = v_exp2(v_mul(x, log2_e));
            sum = v_add(sum, y);
            weighted = v_fma(x, y, weighted);
            missing = n - i < W ? W - (n - i) : 0;
        }
        *z += v_sum(sum) - (float) missing;
        *zx += v_sum(weighted);
    }
}
