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

// In order, k of all: those whose key is above the k-th best, and the first n_equal that equal it. key, chunk: of the j-th.
template <typename Key, typename Number, typename Chunk>
static void choose(int32_t k, Number threshold, int64_t n_equal, int32_t * chosen, Key && key, Chunk && chunk) {
    for (int64_t j = 0, i = 0; i < k; j++) { // without branches, which could not be foreseen
        const Number own = key(j);
        const bool equal = own == threshold;
        chosen[i] = (int32_t) chunk(j);
        i += (own > threshold) | (equal & (n_equal > 0));
        n_equal -= equal;
    }
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
    choose(k, threshold, n_equal, chosen, [=](int64_t b) { return sortable(scores[b]); }, [](int64_t b) { return b; });
}

constexpr int32_t N_MOST = 4096; // columns that scores are compared by

// A number that at least k < n of x reach and, where halving a few times tells them apart, hardly more than k.
static float limit_of(const ops & op, const float * x, int64_t n, int32_t k) {
    float low, high;
    op.limits(x, n, &low, &high);
    int64_t n_reach = n;
    for (int turn = 0; turn < 12 && n_reach > k + k / 8; turn++) {
        const float middle = low + (high - low) / 2;
        int32_t n_above = 0;
        for (int64_t i = 0; i < n; i++) { // becomes vectors
            n_above += x[i] >= middle;
        }
        n_reach = n_above >= k ? n_above : n_reach;
        (n_above >= k ? low : high) = middle;
    }
    return low;
}

// The k-th greatest of n numbers, by halving.
static int32_t greatest_of(const int32_t * x, int64_t n, int32_t k) {
    int64_t low = *std::min_element(x, x + n), high = *std::max_element(x, x + n);
    while (low < high) {
        const int32_t middle = (int32_t) (low + (high - low + 1) / 2);
        int32_t n_above = 0;
        for (int64_t i = 0; i < n; i++) { // becomes vectors
            n_above += x[i] >= middle;
        }
        (n_above >= k ? low : high) = n_above >= k ? middle : middle - 1;
    }
    return (int32_t) low;
}

// The same for k of at most N_MOST / 4; false where a score is no number, or too many are alike. Of the greatest of every so
// many scores, the k-th best is no better than the k-th best of all: what is at least as good holds all that is wanted, and
// little more.
static bool top_k_vectors(const ops & op, const float * scores, int64_t n, int32_t k, int32_t * chosen,
                          int32_t * scratch) {
    float most[N_MOST];
    int32_t keys[N_MOST];
    const int64_t width = std::min<int64_t>(n, std::max(4 * k, 64));
    if (!op.greatest_of_columns(scores, n, width, most)) {
        return false;
    }
    const int64_t n_found = op.find(scores, n, limit_of(op, most, width, k), INFINITY, scratch);
    if (n_found > N_MOST) {
        return false;
    }
    for (int64_t i = 0; i < n_found; i++) {
        keys[i] = (int32_t) (sortable(scores[scratch[i]]) ^ 0x80000000u);
    }
    const int32_t threshold = greatest_of(keys, n_found, k);
    int32_t n_equal = k;
    for (int64_t i = 0; i < n_found; i++) { // becomes vectors
        n_equal -= keys[i] > threshold;
    }
    choose(k, threshold, n_equal, chosen, [&](int64_t j) { return keys[j]; }, [=](int64_t j) { return scratch[j]; });
    return true;
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

// The scalar version counts scores by the range they fall into, and compares only those of the range that holds the k-th best
// (a selection among all takes five times as long).
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
    if (!ops || k > actqkv::N_MOST / 4 || !actqkv::top_k_vectors(*ops, scores, n, k, chosen, scratch)) {
        actqkv::top_k_scalar(scores, n, k, chosen, scratch);
    }
}
