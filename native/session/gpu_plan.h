// Plans of answering steps on a GPU, by a search or by spreads: what planner::choose does on the CPU, by the same
// kernels, queued behind each other, so that the host waits for attention only. What is scored has copies there, all of
// it: the index of keys, or spreads. Keys of candidates come from hot chunks, or over the bus from pinned memory.
#pragma once

#include "../kv/gpu_memory.h"
#include "../kv/store.h"
#include "../retrieval/planner.h"

#include <vector>

namespace actqkv {

// Queries [H][d] of a step, on the GPU, as what is scored (planner::scored_by) and as keys of closed chunks, as stored,
// meet them.
struct gpu_queries {
    const float *q_scored, *q_chunks;
};

class gpu_planner {
public:
    // Bytes of the device's memory for plans of up to n_most chunks; 0: the method has none that can be made there.
    static uint64_t bytes(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params, int32_t n_most);

    // memory: bytes() of them, aligned to 256.
    gpu_planner(const actqkv_cuda & cuda, actqkv_cuda_stream * compute, const kv_store & store, const hparams & hp,
                const actqkv_params & params, int32_t n_most, uint8_t * memory);

    // Whether a choice so wide has room.
    bool has_room(const choice & c) const;

    // Copies what a plan of the layer is made of and is not there yet. Returns the bytes.
    uint64_t bring(int il);
    // Of an index, while text is read, the stretches that are made.
    uint64_t bring_stretches(int il);
    // Chunks from n_closed on will close again.
    void forget_from(int64_t n_closed);
    // Which slot each chunk of the layer has, of the host; -1: none.
    void set_slots(int il, const std::vector<int32_t> & slot_of);

    // Queues the plan of a layer, and brings keys and values of its chunks together, at keys() and values(), in the order of
    // chosen(). temperature 0: no entropy is asked for.
    // slots: of the layer, keys and then values of a chunk in each.
    void make(int il, const choice & c, float temperature, const gpu_queries & q, const uint8_t * slots);

    // Of the plan made last, on the GPU, the chunks [n_chunks] one behind the other.
    const uint8_t * keys() const { return on_gpu.chosen_keys; }
    const uint8_t * values() const { return on_gpu.chosen_values; }
    // What the host is to know of it: report_bytes() at report().
    const void * report() const { return on_gpu.report; }
    uint64_t report_bytes() const { return (1 + width.n_most + width.n_refined) * sizeof(int32_t); }
    struct result {
        float entropy;
        std::vector<int32_t> chunks;  // ascending
        std::vector<int32_t> refined; // candidates whose keys were read, if any were
    };
    result read_report(const choice & c, const void * copy) const;

private:
    struct widths { // of what is laid out
        int32_t n_layer, n_head, n_head_kv, d_head, n_chunk_tokens, kv_type;
        int32_t n_most, n_refined;   // chunks at each stage, at most
        int64_t n_chunks, key_bytes; // n_chunks at most; bytes of a chunk
        int64_t scored_bytes;        // of a chunk's spread, or its part of the index
        int32_t n_picked;            // cells of the index, at most; 0: there is none
        int64_t n_cells, rest_bytes; // n_cells at most; bytes of the keys in order
        uint64_t search_bytes;
    };
    struct layer {
        uint8_t * scored; // spreads, or all stretches but ...
        uint8_t * rest;   // ... the keys in order
        int32_t * slot_of;
        int64_t n_there;                   // spreads, or indexed chunks
        std::vector<actqkv_stretch> index; // with data there
        int64_t n_cells;                   // of them, as a search wants it
    };
    struct arrays {
        std::vector<layer> layers;
        float *folded, *scores, *head_scores, *votes, *cell_scores;
        int32_t *at, *picked;
        uint8_t *refined_keys, *chosen_keys, *chosen_values, *search_scratch;
        int32_t * report; // the entropy as float, chosen [n_most], refined [n_refined]
    };
    static widths widths_of(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params, int32_t n_most);
    static actqkv_search_args search_args(const widths & w, const std::vector<actqkv_stretch> & index);
    static uint64_t lay_out(const widths & w, uint8_t * memory, arrays & to);
    void check(int32_t status) const;
    uint64_t bring_spreads(int il);
    uint64_t bring_index(int il);
    uint64_t copy_stretch(layer & l, const actqkv_stretch & from, uint8_t * to);
    void make_scores(const layer & l, const choice & c, const float * query);
    void search(const layer & l, const choice & c, const float * query);
    void keep(const int32_t * candidates, int64_t n, int64_t k, int32_t * kept);
    int32_t * chosen() const { return on_gpu.report + 1; }
    int32_t * refined() const { return chosen() + width.n_most; }

    const actqkv_cuda & cuda;
    actqkv_cuda_stream * compute;
    const kv_store & store;
    float scale;
    widths width;
    arrays on_gpu;
};

} // namespace actqkv
