// Where the parts of a stretch lie (cells.cpp has the formulas). All of one KV head:
//
//     u32 n_cells, u32 n_keys (that it has; there may be room for more), zeros up to 64 bytes
//     blocks[n/16] of 16 cells each, n: n_cells_most rounded up to 16
//         f32 steps[16]          of centres
//         f32 reaches[16]        how far the keys of a cell lie from its centre, per channel
//         u8 centres[d/8][16][4] byte j of cell i and row w has channels 8w+j, in its low half, and 8w+4+j; 0 .. 15 stand for
//                                -8 .. 7 steps
//         f32 sizes[16]          what a key's size of 1 stands for
//         u32 places[16]         256 times where its keys begin, in sixteens of keys, plus how many they are, less one
//     keys, from a multiple of 16 of them on for each cell, m: a cell's number of keys rounded up to 16
//         u8 sizes[m], u16 chunks[m], u8 signs[d/8][m]
//
// Channel 8i+e of a key is bit e of row i of the signs; set: not negative. Behind the last key are SLACK bytes, which are read
// for nothing.
#pragma once

#include "half.h"
#include "ops.h"
#include "rows.h"

namespace actqkv {

constexpr int64_t CELL_KEYS = 64;       // that a cell of a divided stretch has, on average
constexpr int64_t CELL_KEYS_MOST = 256; // more alike keys are several cells with one centre
constexpr int64_t RUN_KEYS = 32;        // of a chunk, in order, that are a cell at most where a stretch is not divided
constexpr int64_t MAX_KEYS = 1 << 20;   // of a stretch
constexpr int32_t MAX_CHANNELS = 1024;
constexpr int64_t SLACK = 32;

inline int64_t sixteens(int64_t n) { return (n + 15) / 16; }

inline int64_t n_runs_of(int64_t c) { return (c + RUN_KEYS - 1) / RUN_KEYS; } // cells of a chunk in order

// in_order: as struct actqkv_stretch has it.
inline int64_t n_cells_most(int64_t n_keys, int32_t in_order) {
    return in_order ? n_keys / in_order * n_runs_of(in_order) : n_keys / CELL_KEYS + n_keys / CELL_KEYS_MOST + 1;
}

// Sixteens of keys that all cells together have, at most.
inline int64_t sixteens_most(int64_t n_keys, int32_t in_order) {
    return sixteens(n_keys + 15 * n_cells_most(n_keys, in_order));
}

inline int64_t key_bytes(int32_t d) { return 3 + d / 8; }
inline int64_t block_bytes(int32_t d) { return (4 * 4 + d / 2) * CENTRES; }

// Offsets in bytes.
constexpr int64_t BLOCKS_AT = 64; // a row of 16 cells is a cache line
inline int64_t keys_at(int32_t d, int64_t n_keys, int32_t in_order) {
    return BLOCKS_AT + sixteens(n_cells_most(n_keys, in_order)) * block_bytes(d);
}

// Cell i's part of its block.
struct cell_view {
    uint8_t * block; // of one that is made; a search only reads
    int64_t i;       // of the block
    int32_t d;

    float * step() const { return (float *) block + i; }
    float * reach() const { return (float *) block + CENTRES + i; }
    // The byte that has channel e of the centre.
    uint8_t * centre(int32_t e) const { return block + 8 * CENTRES + (e / 8 * CENTRES + i) * 4 + e % 4; }
    float * size() const { return (float *) (block + (8 + d / 2) * CENTRES) + i; }
    uint32_t * place() const { return (uint32_t *) size() + CENTRES; }
    int64_t n_keys() const { return *place() % 256 + 1; }
};

inline bool is_high(int32_t e) { return e % 8 >= 4; }

// A stretch of one KV head.
struct stretch_view {
    uint8_t * data;
    int32_t d;
    int64_t n_keys;
    int32_t in_order;

    uint32_t n_cells() const {
        uint32_t n;
        memcpy(&n, data, sizeof(n));
        return n;
    }
    uint8_t * blocks() const { return data + BLOCKS_AT; }
    cell_view cell(int64_t i) const { return {blocks() + i / CENTRES * block_bytes(d), i % CENTRES, d}; }
    uint8_t * keys(int64_t sixteen) const { return data + keys_at(d, n_keys, in_order) + sixteen * 16 * key_bytes(d); }
    uint8_t * keys_of(const cell_view & cell) const { return keys(*cell.place() / 256); }
};

inline stretch_view view_of(const actqkv_stretch & s, int32_t g, int32_t d) {
    return {const_cast<uint8_t *>(s.data) + g * s.head_stride, d, s.n_keys, s.in_order};
}

} // namespace actqkv
