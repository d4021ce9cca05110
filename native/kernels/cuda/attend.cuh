// What the parts of attend share: all keys of a call, cut into tiles, and the order in which they are met.
#pragma once

#include "common.cuh"

namespace actqkv::cuda {

constexpr int TILE = 32;     // keys of a tile, at most
constexpr int TILE_ONE = 16; // for one query, so that more warps have a share

enum sort : int8_t {
    FAR,
    NEAR,
    MIXED, // met by q_near or q_far, by the distance of query and key
    OWN,   // of the window, seen causally
};

struct tile {
    const uint8_t * far; // rows of KV head 0, the next head `stride` bytes further; NULL where nothing meets them
    const uint8_t * near;
    const uint8_t * v;
    int64_t far_stride, near_stride, v_stride;
    int64_t first;  // position of its first key
    int32_t column; // number of its first key, counted over all spans and the window
    int8_t n;       // keys
    int8_t type;    // of the rows
    int8_t kind;    // enum sort
    int8_t aligned; // see read_piece
};

enum query : int8_t { Q_FAR, Q_TURNED, Q_NEAR, N_QUERIES };

// A pass meets a tile with one sort of query; a mixed tile has two passes. Passes of one sort follow each other, in the
// order of the enum.
__host__ __device__ inline int32_t make_pass(int32_t tile, query q) { return N_QUERIES * tile + q; }
__host__ __device__ inline int32_t tile_of(int32_t pass) { return pass / N_QUERIES; }
__host__ __device__ inline query query_of(int32_t pass) { return (query) (pass % N_QUERIES); }

// Whether the pass is for a tile's near keys.
__host__ __device__ inline bool is_near(const tile & t, query q) {
    return t.kind == MIXED ? q == Q_NEAR : t.kind != FAR;
}

// What near keys, or far ones, of the tile are met by.
__host__ __device__ inline query met_by(const tile & t, bool near) {
    return t.type != F16 ? Q_TURNED : near ? Q_NEAR : Q_FAR;
}

// Arrays of the GPU, but for the struct itself.
struct attention {
    const tile * tiles;  // [list][n_tiles]
    int32_t list_stride; // n_tiles, or 0: one list for all KV heads
    int32_t n_tiles;
    const int32_t * passes; // [n_passes], tiles of one list
    int32_t n_passes;
    int32_t n_head, n_head_kv, r, d, m;
    int64_t n_past, n_clamp;
    float scale;
    const float * queries[N_QUERIES]; // [m][H][d]
    float * out;                      // [m][H][d]
    float * stats;                    // [m][H][2]: greatest logit, sum of e^(logit - greatest)
    float * partial;                  // [N_SPLITS_MAX][H][d + 2], of attend_one
};

// By constants: an index known only at run time would move the struct to local memory.
__host__ __device__ inline const float * queries_of(const attention & a, query q) {
    return q == Q_FAR ? a.queries[Q_FAR] : q == Q_TURNED ? a.queries[Q_TURNED] : a.queries[Q_NEAR];
}

constexpr int N_SPLITS_MAX = 128;

// Whether query i meets key j of the tile in a pass of this sort.
__host__ __device__ inline bool meets(const attention & a, const tile & t, bool near, int i, int j) {
    const int64_t distance = a.n_past + i - (t.first + j);
    return t.kind == OWN ? distance >= 0 : t.kind != MIXED || near == (distance < a.n_clamp);
}

__host__ __device__ inline const uint8_t * keys_of(const tile & t, bool near, int g) {
    return near ? t.near + g * t.near_stride : t.far + g * t.far_stride;
}

int32_t attend_one(actqkv_cuda_stream * s, const attention & a);
int32_t attend_window(actqkv_cuda_stream * s, const attention & a);

} // namespace actqkv::cuda
