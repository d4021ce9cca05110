// cutoff - how spread out a layer's scores are, and its k best chunks (ALGORITHMS.md 3.5, 3.6; ActQKV).
//
//     p = softmax(score / temperature)      h = H(p) / ln n
//
// With x_b = (score_b - max) / temperature and Z = sum_b e^x_b:  H(p) = ln Z - (sum_b x_b e^x_b) / Z.
#include <algorithm>
#include <math.h>
#include <string.h>

#include "ops.h"

namespace actqkv {

static void exp_moments_scalar(const float * scores, int64_t n, float shift, float factor, double * z, double * zx) {
    *z = *zx = 0;
    for (int64_t b = 0; b < n; b++) {
        const double x = ((double) scores[b] - shift) * factor;
        *z += exp(x);
        *zx += x * exp(x);
    }
}

// Unsigned numbers in the order of the scores: -0 equals 0, NaN is 0 and below all.
static uint32_t sortable(float score) {
    score += 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return score != score ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

} // namespace actqkv

extern "C" float actqkv_entropy(int32_t impl, const float * scores, int64_t n, float temperature) {
    if (n <= 1 || !(temperature > 0)) {
        return 0;
    }
    float max = -INFINITY;
    bool finite = true;
    for (int64_t b = 0; b < n; b++) {
        max = scores[b] > max ? scores[b] : max;
        finite = finite && isfinite(scores[b]);
    }
    if (!finite) {
        return 0;
    }
    const actqkv::ops * ops = actqkv::ops_for(impl);
    double z, zx;
    (ops ? ops->exp_moments : actqkv::exp_moments_scalar)(scores, n, max, 1 / temperature, &z, &zx);
    const double h = (log(z) - zx / z) / log((double) n);
    return (float) std::min(std::max(h, 0.0), 1.0);
}

// The k-th best value: scores are counted by the range they fall into, and only those of the range that holds it are
// compared (a selection among all takes five times as long). Then one pass in order of the index: all above it, and of
// its equals the first ones.
extern "C" void actqkv_top_k(const float * scores, int64_t n, int32_t k, int32_t * chosen, int32_t * scratch) {
    if (k >= n) {
        for (int64_t b = 0; b < n; b++) {
            chosen[b] = (int32_t) b;
        }
        return;
    }
    if (k <= 0) {
        return;
    }
    constexpr uint32_t N_RANGES = 1024;
    uint32_t * keys = (uint32_t *) scratch; // the unsigned twin of int32_t may alias it
    uint32_t least = UINT32_MAX, greatest = 0;
    for (int64_t b = 0; b < n; b++) {
        keys[b] = actqkv::sortable(scores[b]);
        least = std::min(least, keys[b]);
        greatest = std::max(greatest, keys[b]);
    }
    int shift = 0;
    while ((greatest - least) >> shift >= N_RANGES) {
        shift++;
    }
    int32_t counts[N_RANGES] = {0};
    for (int64_t b = 0; b < n; b++) {
        counts[(keys[b] - least) >> shift]++;
    }
    uint32_t range = N_RANGES - 1;
    int32_t n_left = k; // to be found in `range` and below
    while (counts[range] < n_left) {
        n_left -= counts[range--];
    }
    int64_t n_within = 0;
    for (int64_t b = 0; b < n; b++) {
        keys[n_within] = keys[b];
        n_within += (keys[b] - least) >> shift == range;
    }
    std::nth_element(keys, keys + (n_within - n_left), keys + n_within);
    const uint32_t threshold = keys[n_within - n_left];
    int64_t n_equal = n_left - std::count_if(keys + (n_within - n_left), keys + n_within,
                                             [=](uint32_t key) { return key > threshold; });
    for (int64_t b = 0, i = 0; i < k; b++) { // without branches, which could not be foreseen
        const uint32_t key = actqkv::sortable(scores[b]);
        const bool equal = key == threshold;
        chosen[i] = (int32_t) b;
        i += (key > threshold) | (equal & (n_equal > 0));
        n_equal -= equal;
    }
}
