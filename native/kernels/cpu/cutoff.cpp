// cutoff - how spread out a layer's scores are, and its k best chunks (docs/algorithms.md 3.5, 3.6; ActQKV).
//
//     p = softmax(score / temperature)      h = H(p) / ln n
//
// With x_b = (score_b - max) / temperature and Z = sum_b e^x_b:  H(p) = ln Z - (sum_b x_b e^x_b) / Z.
#include <algorithm>
#include <float.h>
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

static bool limits_scalar(const float * x, int64_t n, float * least, float * greatest) {
    bool numbers = true;
    *least = INFINITY;
    *greatest = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        *least = std::min(*least, x[i]);
        *greatest = std::max(*greatest, x[i]);
        numbers = numbers && x[i] == x[i];
    }
    return numbers;
}

// Unsigned numbers in the order of the scores: -0 equals 0, NaN is 0 and below all.
static uint32_t sortable(float score) {
    score += 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return score != score ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr uint32_t N_RANGES = 1024; // that scores are counted by

// The range that holds the k-th best; k less those above it.
static uint32_t range_of(const int32_t * counts, int32_t & k) {
    uint32_t range = N_RANGES - 1;
    while (counts[range] < k) {
        k -= counts[range--];
    }
    return range;
}

// One pass in order of the index: all above the k-th best value, and of its equals the first ones.
static void top_k_scalar(const float * scores, int64_t n, int32_t k, int32_t * chosen, int32_t * scratch) {
    uint32_t * keys = (uint32_t *) scratch; // the unsigned twin of int32_t may alias it
    uint32_t least = UINT32_MAX, greatest = 0;
    for (int64_t b = 0; b < n; b++) {
        keys[b] = sortable(scores[b]);
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
    int32_t n_left = k; // to be found in `range` and below
    const uint32_t range = range_of(counts, n_left);
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
        const uint32_t key = sortable(scores[b]);
        const bool equal = key == threshold;
        chosen[i] = (int32_t) b;
        i += (key > threshold) | (equal & (n_equal > 0));
        n_equal -= equal;
    }
}

// The same, with (x - least) * factor as the range of x: finer where most scores are than that of their bits.
static void top_k_vectors(const ops & op, const float * scores, int64_t n, float least, float factor, int32_t k,
                          int32_t * chosen, int32_t * scratch) {
    for (int64_t b = 0; b < n; b++) { // apart from counting, so that this loop becomes vectors
        scratch[b] = (int32_t) ((scores[b] - least) * factor);
    }
    int32_t counts[N_RANGES] = {0};
    for (int64_t b = 0; b < n; b++) {
        counts[scratch[b]]++;
    }
    int32_t n_left = k;
    const int32_t range = (int32_t) range_of(counts, n_left);
    int64_t n_within = 0;
    for (int64_t b = 0; b < n; b++) {
        const bool within = scratch[b] == range;
        scratch[n_within] = (int32_t) b;
        n_within += within;
    }
    std::nth_element(scratch, scratch + (n_left - 1), scratch + n_within,
                     [=](int32_t a, int32_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); });
    const int32_t worst = scratch[n_left - 1];
    const int64_t n_found = op.find(scores, n, scores[worst], INFINITY, scratch);
    for (int64_t i = 0, n_chosen = 0; i < n_found && n_chosen < k; i++) {
        chosen[n_chosen] = scratch[i];
        n_chosen += scores[scratch[i]] > scores[worst] || scratch[i] <= worst;
    }
}

} // namespace actqkv

extern "C" float actqkv_entropy(int32_t impl, const float * scores, int64_t n, float temperature) {
    if (n <= 1 || !(temperature > 0)) {
        return 0;
    }
    const actqkv::ops * ops = actqkv::ops_for(impl);
    float least, max;
    const bool numbers = (ops ? ops->limits : actqkv::limits_scalar)(scores, n, &least, &max);
    if (!numbers || !isfinite(least) || !isfinite(max)) {
        return 0;
    }
    double z, zx;
    const float factor = std::min(1 / temperature, FLT_MAX); // finite also where the temperature is next to nothing
    (ops ? ops->exp_moments : actqkv::exp_moments_scalar)(scores, n, max, factor, &z, &zx);
    const double h = (log(z) - zx / z) / log((double) n);
    return (float) std::min(std::max(h, 0.0), 1.0);
}

// The k-th best value: scores are counted by the range they fall into, and only those of the range that holds it are
// compared (a selection among all takes five times as long). Then all that are as good, in order of the index.
extern "C" void actqkv_top_k(int32_t impl, const float * scores, int64_t n, int32_t k, int32_t * chosen,
                             int32_t * scratch) {
    if (k >= n) {
        for (int64_t b = 0; b < n; b++) {
            chosen[b] = (int32_t) b;
        }
        return;
    }
    if (k <= 0) {
        return;
    }
    const actqkv::ops * ops = actqkv::ops_for(impl);
    float least, greatest;
    const bool numbers = ops && ops->limits(scores, n, &least, &greatest);
    const float factor = numbers ? (float) (actqkv::N_RANGES - 1) / (greatest - least) : 0;
    if (factor > 0 && isfinite(factor)) {
        actqkv::top_k_vectors(*ops, scores, n, least, factor, k, chosen, scratch);
    } else {
        actqkv::top_k_scalar(scores, n, k, chosen, scratch);
    }
}
