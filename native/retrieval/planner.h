// Which chunks a layer attends in this window: probe -> score -> cut-off -> plan (docs/algorithms.md section 3).
#pragma once

#include "../kv/store.h"
#include "actqkv.h"

#include <functional>
#include <vector>

namespace actqkv {

// What a layer has learnt from the history; part of every checkpoint and state.
struct layer_memory {
    std::vector<float> mean, var; // [E] running statistics of far queries
    double n_tokens = 0;          // seen by them, capped
    int64_t n_windows = 0;
    std::vector<double> entropies;      // of the last N_ENTROPIES windows, oldest first
    std::vector<float> question;        // [E] mean of the most attended question queries; empty: none
    std::vector<float> asked_queries;   // [n][E] far queries of the question's most attended tokens ...
    std::vector<float> asked_attention; // [n] ... and the attention they received in their window

    actqkv_running running() { return {mean.data(), var.data(), n_tokens, n_windows}; }
};

constexpr size_t N_ENTROPIES = 100;      // windows over which a layer's entropy is averaged
constexpr size_t N_QUESTION_QUERIES = 4; // averaged into a question (docs/algorithms.md 3.4)

// Called with an array of the current layer; see actqkv_observe_fn. Empty when nobody watches.
using observer = std::function<void(const char * name, const float * data, int64_t ne0, int64_t ne1, int64_t ne2)>;

// The share of one layer in the pool that is left, and the pool after it. h: mean entropies of the layers from this
// one on. published: clamp to [32, 2k] whatever the pool and the chunks say.
int64_t cutoff_share(int64_t pool, const double * h, int n_layers_left, int64_t k, int64_t n_chunks, bool published);

// Chunks to attend beside sinks, remainder and local.
struct chunk_plan {
    std::vector<int32_t> chunks; // n_lists lists of n ids, each ascending
    int32_t n = 0;
    int32_t n_lists = 1; // 1: one list for all heads; else a list per KV head
};

// How many candidates are left after each stage of choosing k chunks in an answering step.
struct choice {
    int64_t k;         // granted
    int64_t n_chunks;  // in all, every one scored
    int64_t n_refined; // of the best; k where keys are not looked at
    int32_t n_picked;  // cells of an index that each query head looks into; 0: scored by summaries
};
choice choice_of(const actqkv_method & method, int64_t share, int64_t n_chunks);

// The true attention mass of the current window in the layer that is planned, [n_chunks], or per KV head [G][n_chunks].
using mass_source = std::function<const std::vector<double> &(bool per_head)>;

struct planner_stage {
    double ms;
    uint64_t bytes;
};

class planner {
public:
    // Both are read at every window: what answers may change between windows.
    planner(const hparams & hp, const actqkv_params & reading, const actqkv_params & answering);

    // Memory that searching an index over n_chunks chunks takes, at most.
    static uint64_t search_bytes(const hparams & hp, const actqkv_params & params, int64_t n_chunks);

    // Before the first layer of a window.
    void begin_window(const std::vector<layer_memory> & memory, int64_t n_chunks, bool decode);

    // q_far, q_near: [m][E]; q_stored: as the keys of closed chunks meet them. Updates memory's statistics (reading) and
    // entropies.
    const chunk_plan & plan(int il, layer_memory & memory, const kv_store & store, const float * q_far,
                            const float * q_near, const float * q_stored, int m, const mass_source & true_mass,
                            const observer & observe);

    // Whether another may plan the layer in plan()'s place: an answering step, one list, by a search or by spreads
    // alone.
    bool is_open(int il, const kv_store & store) const;
    // By these numbers; before plan(), or ...
    choice choice_of(int il) const;
    // ... in its place, with the plan that was made so, and the entropy of its scores where that is asked for: at this
    // temperature, if it is not 0.
    const chunk_plan & take(int il, layer_memory & memory, std::vector<int32_t> chunks, float entropy);
    float entropy_temperature() const { return counts_entropy() ? now().method.cutoff_temperature : 0.0f; }
    // What a step's scores are made of: queries as keys of the index meet them, or summaries.
    const float * scored_by(const float * q_far, const float * q_near) const {
        return is_searched() ? met_by_keys(q_far, q_near) : met_by_summaries(q_far, q_near);
    }

    // Of the layer that was planned last, for recording; NULL and NaN where there is no such thing.
    struct trace {
        const float * bias;    // [m]
        const float * weights; // [m]
        float entropy;
    };
    const trace & last() const { return traced; }

    planner_stage probe_stage = {}, score_stage = {}, refine_stage = {};

private:
    const actqkv_params & now() const { return is_decode ? answering : reading; }
    int32_t retrieval_of(int il) const;
    const float * met_by_summaries(const float * q_far, const float * q_near) const;
    const float * met_by_keys(const float * q_far, const float * q_near) const;
    void make_probe(layer_memory & memory, const float * q_far, const float * q_met, int m, const observer & observe);
    void make_scores(int il, const layer_memory & memory, const kv_store & store);
    void make_spread_scores(int il, const kv_store & store);
    void make_votes(int il, const kv_store & store);
    void search(int il, const kv_store & store, const float * query);
    void choose_all();
    void choose(int il, const choice & c, const kv_store & store, const float * stored_query);
    void keep_candidates(int64_t k);
    void choose_each(const float * list_scores, int64_t k, int32_t n_lists);
    void plan_by_score(int il, layer_memory & memory, const kv_store & store, const float * query,
                       const float * stored_query, const observer & observe);
    void plan_by_mass(const mass_source & true_mass, const observer & observe);
    int64_t share_of(int il) const;
    bool is_searched() const { return is_decode && now().method.scan > 0; }
    bool counts_entropy() const;
    void note_entropy(layer_memory & memory, float entropy);
    int64_t grant(int il);

    const hparams & hp;
    const actqkv_params &reading, &answering;
    int64_t n_chunks = 0;
    bool is_decode = false;
    bool equal_shares = true; // of this window's layers, whatever their entropies
    int64_t pool = 0;
    std::vector<double> mean_entropy; // [n_layer]
    std::vector<float> bias, weights, probe, folded, scores, question_scores;
    std::vector<float> head_scores, votes;
    std::vector<int32_t> candidates, kept, scratch, picked;
    std::vector<float> cell_scores;
    std::vector<uint8_t> search_scratch;
    chunk_plan chosen;
    trace traced = {};
};

} // namespace actqkv
