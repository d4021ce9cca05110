// kmeans - keys that are alike, brought together.
//
//     cell(j) = argmax_i k_j . c_i - |c_i|^2 / 2      (the least distance)        c_i = mean of the keys of cell i
//
// from below: blocks of 1,024 keys first, each with centres of its own, which are keys in equal distances to begin with; then
// four blocks together, and so on, 3 rounds at every width. Where centres are many, a key looks for its next one among the 128
// that were nearest to its own when the width began. Centres that began among few keys, and were moved by more and more, end
// where rare keys are: of one k-means over all keys at once the same number of rounds finds fewer (native/README.md).
#include "kmeans.h"

#include <math.h>
#include <string.h>

namespace actqkv {
namespace {

constexpr int ROUNDS = 3;             // at every width
constexpr int64_t LEAST_BLOCK = 1024; // keys
constexpr int32_t N_NEIGHBOURS = 128; // centres among which a key looks for a nearer one

float product_scalar(const kept_keys & keys, int64_t j, const float * row, int32_t d) {
    float product = 0;
    for (int32_t e = 0; e < d; e++) {
        product += row[e] * row_value(keys.type, keys.at(j), e);
    }
    return product;
}

int32_t nearest_scalar(const kept_keys & keys, int64_t j, const float * rows, const float * halves, int32_t n_rows,
                       int32_t d) {
    float best = -INFINITY;
    int32_t found = 0;
    for (int32_t i = 0; i < n_rows; i++) {
        const float closeness = product_scalar(keys, j, rows + (int64_t) i * d, d) - halves[i];
        found = closeness > best ? i : found;
        best = closeness > best ? closeness : best;
    }
    return found;
}

} // namespace

// A run of keys and the centres that began among them: keys [first_key, end_key), centres [first, end).
struct kmeans::block {
    int64_t first_key, end_key;
    int32_t first, end;

    int32_t n() const { return end - first; }
};

void add_key(const ops * op, const kept_keys & keys, int64_t j, int32_t d, float * sum) {
    const float one = 1;
    if (op) {
        op->of(keys.type).mix(&one, 1, 1, keys.at(j), 1, d, sum, d, nullptr);
        return;
    }
    for (int32_t e = 0; e < d; e++) {
        sum[e] += row_value(keys.type, keys.at(j), e);
    }
}

uint64_t kmeans::lay_out(uint8_t * base, int32_t n_channels, int64_t n, int32_t C) {
    uint64_t used = 0;
    const auto take = [&](uint64_t bytes) {
        uint8_t * p = base ? base + used : nullptr;
        used += (bytes + 63) / 64 * 64;
        return p;
    };
    const uint64_t row = n_channels * sizeof(float);
    which = (int32_t *) take(n * sizeof(int32_t));
    counts = (int32_t *) take(C * sizeof(int32_t));
    order = (int32_t *) take(n * sizeof(int32_t));
    centres = (float *) take(C * row);
    halves = (float *) take(C * sizeof(float));
    sums = (float *) take(C * row);
    ends = (int32_t *) take(C * sizeof(int32_t));
    found = (int32_t *) take((n + N_PANEL) * sizeof(int32_t));
    neighbours = (int32_t *) take((uint64_t) C * N_NEIGHBOURS * sizeof(int32_t));
    near = (float *) take(N_NEIGHBOURS * row);
    near_halves = (float *) take(N_NEIGHBOURS * sizeof(float));
    panel = (float *) take(N_PANEL * row);
    products = (float *) take((uint64_t) C * N_PANEL * sizeof(float));
    closeness = (float *) take(C * sizeof(float));
    room = (int32_t *) take(C * sizeof(int32_t));
    rounded = (actqkv_f16 *) take(N_PANEL * n_channels * sizeof(actqkv_f16));
    together = take(N_PANEL * row);
    return used;
}

void kmeans::halve_squares(const block & b) {
    for (int32_t i = b.first; i < b.end; i++) {
        halves[i] = 0;
        for (int32_t e = 0; e < d; e++) {
            halves[i] += centres[(int64_t) i * d + e] * centres[(int64_t) i * d + e] / 2;
        }
    }
}

// Centres become the means of their keys; one without keys stays.
void kmeans::move_centres(const block & b) {
    memset(sums + (int64_t) b.first * d, 0, (uint64_t) b.n() * d * sizeof(float));
    memset(counts + b.first, 0, b.n() * sizeof(int32_t));
    for (int64_t j = b.first_key; j < b.end_key; j++) {
        add_key(op, keys, j, d, sums + (int64_t) which[j] * d);
        counts[which[j]]++;
    }
    for (int32_t i = b.first; i < b.end; i++) {
        for (int32_t e = 0; counts[i] > 0 && e < d; e++) {
            centres[(int64_t) i * d + e] = sums[(int64_t) i * d + e] / (float) counts[i];
        }
    }
    halve_squares(b);
}

// The block's keys by centre, in order[first_key ..): those of centre i end at ends[i], which is where the next begin.
void kmeans::group_keys(const block & b) {
    int32_t at = (int32_t) b.first_key;
    for (int32_t i = b.first; i < b.end; i++) {
        ends[i] = at;
        at += counts[i];
    }
    for (int64_t j = b.first_key; j < b.end_key; j++) {
        order[ends[which[j]]++] = (int32_t) j;
    }
}

// Of every centre of the block the N_NEIGHBOURS that are nearest to it, itself among them, in order of their numbers. SIMD:
// centres are rounded to f16 for this.
void kmeans::find_neighbours(const block & b) {
    const float * rows = centres + (int64_t) b.first * d;
    for (int32_t from = 0; from < b.n(); from += N_PANEL) {
        const int32_t n_here = b.n() - from < N_PANEL ? b.n() - from : N_PANEL;
        if (op) {
            op->to_f16(rows + (int64_t) from * d, rounded, (int64_t) n_here * d);
            op->f16.pack_k(rounded, n_here, d, panel, 0);
            op->logits(rows, b.n(), d, panel, products, N_PANEL);
        }
        for (int32_t j = 0; j < n_here; j++) {
            const float * own = rows + (int64_t) (from + j) * d;
            for (int32_t i = 0; i < b.n(); i++) {
                float product = op ? products[(int64_t) i * N_PANEL + j] : 0;
                for (int32_t e = 0; !op && e < d; e++) {
                    product += rows[(int64_t) i * d + e] * own[e];
                }
                closeness[i] = product - halves[b.first + i];
            }
            actqkv_top_k(impl, closeness, b.n(), N_NEIGHBOURS,
                         neighbours + (int64_t) (b.first + from + j) * N_NEIGHBOURS, room);
        }
    }
}

// Which of rows[0 .. n_rows) is nearest to each of the keys numbers[0 .. n): indices of rows, in nearest.
void kmeans::find_nearest(const int32_t * numbers, int64_t n, const float * rows, const float * halves_of,
                          int32_t n_rows, int32_t * nearest) {
    for (int64_t at = 0; !op && at < n; at++) {
        nearest[at] = nearest_scalar(keys, numbers[at], rows, halves_of, n_rows, d);
    }
    for (int64_t at = 0; op && at < n; at += N_PANEL) {
        const int n_here = (int) (n - at < N_PANEL ? n - at : N_PANEL);
        for (int j = 0; j < N_PANEL; j++) { // the last in the place of those that are missing
            memcpy(together + j * keys.row_bytes, keys.at(numbers[at + (j < n_here ? j : n_here - 1)]), keys.row_bytes);
        }
        op->of(keys.type).pack_k(together, N_PANEL, d, panel, 0);
        op->nearest(rows, n_rows, d, halves_of, panel, n_here, nearest + at);
    }
}

// which[j] of the block's keys: the nearest of all its centres or, where those are many, of the neighbours of the one that
// each has.
void kmeans::assign(const block & b) {
    if (b.n() <= N_NEIGHBOURS) {
        for (int64_t j = b.first_key; j < b.end_key; j++) {
            order[j] = (int32_t) j;
        }
        const int64_t n = b.end_key - b.first_key;
        find_nearest(order + b.first_key, n, centres + (int64_t) b.first * d, halves + b.first, b.n(), found);
        for (int64_t j = 0; j < n; j++) {
            which[b.first_key + j] = b.first + found[j];
        }
        return;
    }
    group_keys(b);
    for (int32_t i = b.first; i < b.end; i++) {
        const int32_t from = i > b.first ? ends[i - 1] : (int32_t) b.first_key, n = ends[i] - from;
        const int32_t * own = neighbours + (int64_t) i * N_NEIGHBOURS;
        for (int32_t k = 0; n > 0 && k < N_NEIGHBOURS; k++) {
            memcpy(near + (int64_t) k * d, centres + (int64_t) (b.first + own[k]) * d, d * sizeof(float));
            near_halves[k] = halves[b.first + own[k]];
        }
        find_nearest(order + from, n, near, near_halves, N_NEIGHBOURS, found);
        for (int32_t j = 0; j < n; j++) {
            which[order[from + j]] = b.first + own[found[j]];
        }
    }
}

void kmeans::divide(int32_t given, const kept_keys & from, int32_t n_channels, int64_t n, int32_t C) {
    op = ops_for(given);
    impl = given;
    d = n_channels;
    keys = from;
    memset(centres, 0, (uint64_t) C * d * sizeof(float));
    for (int32_t i = 0; i < C; i++) {
        add_key(op, keys, n * i / C, d, centres + (int64_t) i * d);
    }
    int32_t n_here = (int32_t) (LEAST_BLOCK / (n / C)); // centres of a block; times 4, so that blocks are of whole ones
    for (int64_t width = LEAST_BLOCK;; width *= 4, n_here *= 4) {
        const bool last = width >= n;
        for (int32_t first = 0; first < C;) {
            const bool all = last || C - first < 2 * n_here; // what is left over goes to the last
            const int32_t end = all ? C : first + n_here;
            const block b = {n * first / C, n * end / C, first, end};
            halve_squares(b);
            if (b.n() > N_NEIGHBOURS) {
                find_neighbours(b);
            }
            for (int round = 0; round < ROUNDS; round++) {
                assign(b);
                move_centres(b);
            }
            first = end;
        }
        if (last) {
            return;
        }
    }
}

} // namespace actqkv
