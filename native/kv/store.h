// The KV of one session in CPU RAM: K and V of every past token, a ring with the recent keys in their second form,
// the attention they received, and the summaries of closed chunks. It only ever holds the past.
//
// Clamped positions store keys without RoPE (far) and keep the recent ones with RoPE (near) in the ring;
// exact positions store near and keep far in the ring, for summaries.
#pragma once

#include "../kernels/kernels.h"
#include "../model/hparams.h"
#include "layout.h"
#include "reservation.h"

#include <vector>

namespace actqkv {

// Number of f16 per chunk and layer of a summary kind.
int64_t summary_width(int32_t kind, const hparams & hp);

// What a rewind needs of the recent past, beside K and V, which stay where they are.
struct recent_state {
    std::vector<actqkv_f16> keys; // all layers' rings
    std::vector<float> sums;      // all layers' attention sums
};

class kv_store {
public:
    kv_store(const hparams & hp, const actqkv_params & params);

    static kv_layout layout_for(const hparams & hp, const actqkv_params & params);
    static void add_memory(const hparams & hp, const actqkv_params & params, actqkv_memory & memory);

    const kv_layout & layout() const { return shape; }
    int64_t n_closed() const { return n_closed_chunks; }

    // Copies a window's keys and values, f16 [G][m][d] with KV heads `stride` apart, behind token n_past.
    void append(int il, int64_t n_past, int m, const actqkv_f16 * near, const actqkv_f16 * far, const actqkv_f16 * v,
                int64_t stride);

    // The run of tokens [first, last) of one block as attention sees it. with_recent: offer both forms of the keys.
    actqkv_span span(int il, int64_t block, int64_t first, int64_t last, bool with_recent) const;

    // Adds weight sums [H][stride] of the tokens from `first` on, n of them, none of them sinks.
    void add_sums(int il, int64_t first, int64_t n, const float * sums, int64_t stride);

    // Starts the sums of the tokens [first, last) at zero.
    void clear_sums(int il, int64_t first, int64_t last);

    // Closes every chunk that ends at or before `limit`: summarises it in all layers.
    void close_until(int64_t limit, int n_threads);

    // Stored keys of chunk 0; chunk b lies b * chunk_stride() further, [G][c][d].
    const actqkv_f16 * chunk_keys(int il) const { return layers[il].k.data() + shape.block_offset(1); }
    int64_t chunk_stride() const { return shape.n_chunk_tokens * shape.token_stride(); }

    // Rows of summaries: one of width() f16 per chunk; with a list per KV head, n_rows() of width() / n_rows() each, row
    // i of chunk b at i*row_stride() + b*width()/n_rows(): those of one head lie together. A head's bounds are [2][d].
    const actqkv_f16 * summaries(int il) const { return layers[il].reps.data(); }
    const float * norms(int il) const { return layers[il].norms.data(); }
    int64_t width() const { return n_width; }
    int32_t n_rows() const { return n_summary_rows; }
    int64_t row_stride() const { return n_chunks_max * n_width / n_summary_rows; }
    bool summarises() const { return n_width > 0; }
    // Whether summaries, or the question, need the attention that recent keys receive.
    bool sums_attention() const { return n_sums > 0; }

    recent_state save_recent() const;
    void restore_recent(const recent_state & state, int64_t n_closed);

    // K, V and summaries of one layer as byte ranges in use for so many tokens and closed chunks: state blobs are made
    // of them.
    struct range {
        const void * data;
        uint64_t bytes;
    };
    std::vector<range> used_ranges(int il, int64_t n_tokens, int64_t n_closed) const;
    void set_closed(int64_t n) { n_closed_chunks = n; }

private:
    struct layer {
        reservation<actqkv_f16> k, v;
        reservation<actqkv_f16> reps;   // [row][chunk][width / rows]
        reservation<float> norms;       // [chunk]
        std::vector<actqkv_f16> recent; // ring of the other form of the keys
        std::vector<float> sums;        // ring of [block][H][c]
    };

    void summarize(int il, int64_t chunk, actqkv_f16 * rep);

    float * sums_of(int il, int64_t chunk) {
        return layers[il].sums.data() + (chunk % shape.n_recent_blocks) * n_head * shape.n_chunk_tokens;
    }

    kv_layout shape;
    int32_t n_head;
    int32_t summary_kind, n_representatives, n_summary_rows;
    bool summarises_stored; // else the keys without RoPE, which the ring holds where the store has them rotated
    int64_t n_sums;         // attention sums of a layer's ring; 0: nobody needs them
    int64_t n_width;        // 0: the method never retrieves, nothing is summarised
    int64_t n_chunks_max;
    bool stores_near;
    int64_t n_closed_chunks = 0;
    std::vector<layer> layers;
};

} // namespace actqkv
