// The keys of one KV head, divided into cells of keys that are alike (kmeans.cpp has the formulas).
#pragma once

#include "half.h"
#include "ops.h"
#include "rows.h"

namespace actqkv {

// The keys of one KV head, as they are kept.
struct kept_keys {
    int32_t type;
    const uint8_t * first;
    int64_t chunk_stride, c, row_bytes;

    const uint8_t * at(int64_t j) const { return first + j / c * chunk_stride + j % c * row_bytes; }
};

// sum [d] += key j
void add_key(const ops * op, const kept_keys & keys, int64_t j, int32_t d, float * sum);

struct kmeans {
    // The scratch of n keys and C centres; base NULL: only how many bytes it takes.
    uint64_t lay_out(uint8_t * base, int32_t d, int64_t n, int32_t C);

    // which[j] of n keys: their centres, of C, and how many each has: counts. Some may have none.
    void divide(int32_t impl, const kept_keys & keys, int32_t d, int64_t n, int32_t C);

    int32_t * which;  // [n]
    int32_t * counts; // [C]
    int32_t * order;  // [n] room

private:
    struct block;
    void halve_squares(const block & b);
    void move_centres(const block & b);
    void group_keys(const block & b);
    void find_neighbours(const block & b);
    void assign(const block & b);
    void find_nearest(const int32_t * numbers, int64_t n, const float * rows, const float * halves_of, int32_t n_rows,
                      int32_t * found);

    const ops * op;
    int32_t impl, d;
    kept_keys keys;
    float * centres;      // [C][d]
    float * halves;       // [C] |c|^2 / 2
    float * sums;         // [C][d]
    int32_t * ends;       // [C]
    int32_t * found;      // [n]
    int32_t * neighbours; // [C][N_NEIGHBOURS]
    float * near;         // [N_NEIGHBOURS][d]
    float * near_halves;  // [N_NEIGHBOURS]
    float * panel;        // [d][N_PANEL]
    float * products;     // [C][N_PANEL]
    float * closeness;    // [C]
    int32_t * room;       // [C]
    actqkv_f16 * rounded; // [N_PANEL][d]
    uint8_t * together;   // [N_PANEL] keys as they are kept
};

} // namespace actqkv
