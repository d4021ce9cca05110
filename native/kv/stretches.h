// An index of closed chunks' keys, which answering steps search (kernels.h, cells). Chunks are taken together to stretches of
// 65,536 tokens, what is left of 16,384, then of 4,096 and of 1,024; what is left then is the rest, in order and without
// cells of alike keys: so every set of closed chunks has one index, whatever was closed, or gone back over, before. While text
// is read only the two longest kinds are made, the others when a step is about to search. The longer a stretch is, the more
// alike are the keys of a cell, and the fewer must be looked at (native/README.md).
#pragma once

#include "../kernels/kernels.h"
#include "layout.h"
#include "reservation.h"

#include <array>
#include <vector>

namespace actqkv {

class stretches {
public:
    // n_layer 0: there are none.
    stretches(const kv_layout & layout, int n_layer, int64_t n_chunks_max);

    // Bytes of a layer's stretches per chunk, as if each had an equal part: they lie there one behind the other, shorter ones
    // where a long one will. 0 where actqkv_stretch_bytes() has none.
    static int64_t chunk_bytes(const kv_layout & layout);
    static int64_t longest_bytes(const kv_layout & layout) {
        return stretch_chunks(layout.n_chunk_tokens) * chunk_bytes(layout);
    }
    // Of a layer's rest, which lies beside them; and its sizes, as of() has them.
    static int64_t rest_bytes(const kv_layout & layout) { return layout.n_head_kv * sizes_of_rest(layout).head_stride; }
    static actqkv_stretch sizes_of_rest(const kv_layout & layout);
    // Beside both, while those of n_chunks chunks are made: of each thread.
    static uint64_t scratch_bytes(const kv_layout & layout, int64_t n_chunks);
    // As many of each kind as n_chunks chunks may be taken to, in order, and a rest: without data. And their cells, at most.
    static std::vector<actqkv_stretch> most_of(const kv_layout & layout, int64_t n_chunks);
    static int64_t n_cells_most(const std::vector<actqkv_stretch> & all);
    bool exist() const { return !layers.empty(); }
    // Those of chunks [0, n_closed) in order; after make(), all of them.
    const std::vector<actqkv_stretch> & of(int il) const { return layers[il].views; }
    uint8_t * data(int il) { return layers[il].bytes.data(); }
    const uint8_t * data(int il) const { return layers[il].bytes.data(); }
    uint64_t n_bytes(int il) const { return layers[il].bytes.bytes(); }

    // Whether all of the first n_closed chunks are indexed, and no more.
    bool is_whole(int64_t n_closed) const { return end_of(made) + rest.n == n_closed; }
    // make() reads keys of no chunks before this one.
    int64_t first_missing(int64_t n_closed, bool all) const;

    // Makes what is missing: all, or only the longest. keys[il]: as chunk_keys(); common [n_layer][G][d] as
    // actqkv_make_stretch() has it.
    void make(int64_t n_closed, bool all, const std::vector<const uint8_t *> & keys, const std::vector<float> & common,
              int n_threads);
    // Chunks from n on will close again.
    void forget_from(int64_t n);
    // The longest among the first n chunks are there, from a file or a blob.
    void adopt(int64_t n);
    // Whether a search may use the i-th of the longest, wherever it is from.
    bool is_sound(int il, int64_t i) const;

private:
    struct run { // of chunks
        int64_t first, n;
        bool operator==(const run & other) const { return first == other.first && n == other.n; }
    };
    struct layer {
        reservation<uint8_t> bytes, rest;
        std::vector<actqkv_stretch> views;
    };
    std::vector<run> runs_of(int64_t n_closed, size_t n_levels) const;
    actqkv_stretch view(const layer & l, const run & r) const;
    actqkv_stretch view_of_rest(const layer & l) const;
    static int64_t end_of(const std::vector<run> & runs);
    void show();

    kv_layout shape;
    int64_t slot_bytes;    // chunk_bytes()
    std::vector<run> made; // of divided stretches
    run rest = {0, 0};     // right behind them, if there are any
    std::vector<layer> layers;
};

} // namespace actqkv
