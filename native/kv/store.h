// The KV of one session in CPU RAM: a ring with the sinks and the tokens of no closed chunk in f16, keys with RoPE at
// their true position (near) and without (far), and the attention that they received; closed chunks in params.kv_type;
// their summaries. It only ever holds the past.
//
// Clamped positions keep the far keys of closed chunks, exact positions the near ones. Chunks are quantised when they
// close, from f16; summaries are of keys in f16.
#pragma once

#include "../kernels/kernels.h"
#include "../model/hparams.h"
#include "file.h"
#include "guard.h"
#include "layout.h"
#include "reservation.h"
#include "stretches.h"

#include <array>
#include <memory>
#include <vector>

namespace actqkv {

// Whether keys are indexed, for answering steps to search.
inline bool searches(const actqkv_method & m) { return m.decode == ACTQKV_RETRIEVE_TOP && m.scan > 0; }

// Number of f16 per chunk and layer of a summary kind; 0 for spreads (kernels.h), which are of another make.
int64_t summary_width(int32_t kind, const hparams & hp);

// What a rewind needs beside closed chunks and sinks, which stay where they are: the blocks that were open.
struct recent_state {
    std::vector<actqkv_f16> kv; // per layer and block: near and far keys and values, [G][c][d] each
    std::vector<float> sums;    // per layer and block: attention sums [H][c]
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

    // The run of tokens [first, last) of one block as attention sees it. both: offer both forms of the keys, where
    // positions are clamped and the block is not closed.
    actqkv_span span(int il, int64_t block, int64_t first, int64_t last, bool both) const;

    // Adds weight sums [H][stride] of the tokens from `first` on, n of them, none of them sinks.
    void add_sums(int il, int64_t first, int64_t n, const float * sums, int64_t stride);

    // Starts the sums of the tokens [first, last) at zero.
    void clear_sums(int il, int64_t first, int64_t last);

    // Chunks that end at or before `limit`.
    int64_t n_closed_at(int64_t limit) const {
        return limit < shape.n_sink ? 0 : (limit - shape.n_sink) / shape.n_chunk_tokens;
    }

    // Closes every chunk that ends at or before `limit`: stores and summarises it in all layers.
    void close_until(int64_t limit, int n_threads);

    // Inserts n copies of closed chunks, the first again and again, behind them: of n_tokens tokens, those of no closed chunk
    // follow n chunks later.
    void repeat_chunks(int64_t n, int64_t n_tokens, int n_threads);

    // The ring of a layer: sinks, then open blocks, at layout().recent_offset().
    struct ring {
        const actqkv_f16 *near, *far, *v;
    };
    ring ring_of(int il) const { return {layers[il].near.data(), layers[il].far.data(), layers[il].v_open.data()}; }

    // Keys of closed chunks, [chunk][G][c] rows of layout().row_bytes(); turned (kernels.h) unless they are f16.
    const uint8_t * chunk_keys(int il) const { return layers[il].k.data(); }

    // Rows of summaries: one of width() f16 per chunk; with a list per KV head, n_rows() of width() / n_rows() each, row
    // i of chunk b at i*row_stride() + b*width()/n_rows(): those of one head lie together. A head's bounds are [2][d].
    const actqkv_f16 * summaries(int il) const {
        check_summaries(il);
        return (const actqkv_f16 *) layers[il].reps.data();
    }
    // Or spreads, [chunk] of summary_bytes() each.
    const uint8_t * spreads(int il) const {
        check_summaries(il);
        return layers[il].reps.data();
    }
    const float * norms(int il) const { return layers[il].norms.data(); }
    // The index of a layer's closed keys, whole after index_keys(); none where the method does not search.
    const std::vector<actqkv_stretch> & index(int il) const {
        check_index(il);
        return indexed.of(il);
    }
    bool has_index() const { return indexed.exist(); }
    // Before a step searches: indexes what has closed since.
    void index_keys(int n_threads);
    int64_t width() const { return n_summary_bytes / (int64_t) sizeof(actqkv_f16); }
    int64_t summary_bytes() const { return n_summary_bytes; }
    int32_t n_rows() const { return n_summary_rows; }
    int64_t row_stride() const { return n_chunks_max * width() / n_summary_rows; }
    bool summarises() const { return n_summary_bytes > 0; }
    // Whether summaries, or the question, need the attention that recent keys receive.
    bool sums_attention() const { return n_sums > 0; }

    // The open blocks of n_tokens in all; and back to them, with n_closed chunks closed.
    recent_state save_recent(int64_t n_tokens) const;
    void restore_recent(const recent_state & state, int64_t n_tokens, int64_t n_closed);
    // Elements of such a state.
    uint64_t recent_kv(int64_t n_tokens, int64_t n_closed) const;
    uint64_t recent_sums(int64_t n_tokens, int64_t n_closed) const;

    // Sinks, closed chunks, their summaries and long stretches of one layer as byte ranges in use for so many tokens and closed
    // chunks: state blobs are made of them.
    struct range {
        const void * data;
        uint64_t bytes;
    };
    std::vector<range> used_ranges(int il, int64_t n_tokens, int64_t n_closed) const;
    // Of them, the sinks: keys near and far, and values.
    std::vector<range> sink_ranges(int il) const;
    void set_closed(int64_t n);
    // Such ranges were filled in.
    void take_index();

    // Closed chunks of one layer in the order of a KV file (file_array); 0 chunk_bytes where there are none.
    std::array<chunk_array, N_FILE_ARRAYS> chunk_arrays(int il) const;
    // Bytes of a closed chunk in each of them.
    static std::array<uint64_t, N_FILE_ARRAYS> chunk_bytes(const hparams & hp, const actqkv_params & params);

    void write_chunks(kv_file & file, int64_t first, int64_t last) const;
    // Gives the memory of the first n chunks, all of them written, back: from now on the file stands for it, where whole pages
    // of memory can be mapped. What was read back of their keys and values leaves memory as well.
    void spill(std::shared_ptr<const kv_file> file, int64_t n);
    // The first n chunks of the file become this store's; they are checked when they are first read.
    void take_chunks(std::shared_ptr<const kv_file> file, int64_t n);
    // Whether chunks are, or have been, mapped from a file.
    bool is_mapped() const { return source != nullptr; }
    // ACTQKV_ERR_STATE where the file that chunks are mapped from was cut short, or could not be read (guard.h): what was
    // computed since the last time this returned is then worth nothing, and the store is lost.
    void check_file() const;
    // Checks those of chunks [first, last) that the file had when it was opened. Attention and scoring check what they read.
    void check_between(int64_t first, int64_t last) const;
    // Whoever reads chunk_keys() says first which chunks.
    void check_chunks(int il, file_array array, const int32_t * chunks, int64_t n) const;
    // Has the system read those that are still to be checked, all at once: one by one, each would wait for the disk.
    void fetch_chunks(int il, file_array array, const int32_t * chunks, int64_t n) const;

private:
    struct layer {
        reservation<uint8_t> k, v;                 // closed chunks [chunk][G][c], rows of shape.kv_type
        reservation<uint8_t> reps;                 // f16 [row][chunk][width / rows], or spreads [chunk]
        reservation<float> norms;                  // [chunk], of summaries in f16
        std::vector<actqkv_f16> near, far, v_open; // rings of [block][G][tokens][d]
        std::vector<float> sums;                   // ring of [block][H][c]
        std::vector<float> centre;                 // room for spread(): threads cannot report that there is no memory
    };

    void store_chunk(int il, int64_t chunk);
    void index_until(int64_t n_closed, bool all, int n_threads);
    void check_index(int il) const;
    void spread(int il, int64_t first, int64_t last);
    void summarize(int il, int64_t chunk, actqkv_f16 * rep);
    uint8_t & was_checked(int il, file_array array, int64_t chunk) const;
    void check_array(int il, file_array array, int64_t chunk) const;
    void check_summaries(int il) const;
    void map_from(std::shared_ptr<const kv_file> file);

    float * sums_of(int il, int64_t chunk) {
        return layers[il].sums.data() + (chunk % shape.n_recent_blocks) * n_head * shape.n_chunk_tokens;
    }

    kv_layout shape;
    int32_t n_head;
    int32_t summary_kind, n_representatives, n_summary_rows;
    bool stores_near, summarises_near; // else far
    int64_t n_sums;                    // attention sums of a layer's ring; 0: nobody needs them
    int64_t n_summary_bytes;           // of a chunk; 0: the method never retrieves, nothing is summarised
    int64_t n_norms;                   // of a chunk
    int64_t n_chunks_max;
    int64_t n_closed_chunks = 0;
    std::vector<layer> layers;
    stretches indexed;

    std::shared_ptr<const kv_file> source;          // mapped here
    std::vector<guard> guards;                      // of all arrays, since something is
    int64_t n_from_file = 0;                        // its first chunks, as it had them when it was opened
    int64_t n_spilled = 0;                          // its first chunks, which it stands for
    mutable std::vector<uint8_t> checked;           // [layer][array][chunk], those of the file
    mutable std::vector<uint8_t> summaries_checked; // [layer]
    mutable std::vector<uint8_t> index_checked;     // [layer]
};

} // namespace actqkv
