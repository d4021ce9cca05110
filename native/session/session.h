// A session: one history over one model. The file to read first; session.cpp is the life of a window.
//
//   decode -> windows of the history -> for each layer: graph segment gives q, k, v -> planner: probe, score,
//   cut-off, plan -> attend over sinks + plan + remainder + local + window -> append -> next segment -> logits
#pragma once

#include "../graph/runner.h"
#include "../kv/store.h"
#include "../retrieval/method.h"
#include "../retrieval/planner.h"
#include "checkpoint.h"
#include "gpu.h"
#include "history.h"

namespace actqkv {

class session {
public:
    session(const llama_model * model, const actqkv_params & params);
    // file.cpp: where a KV file's reading stands; `write`: it can be read on, into the file.
    session(const llama_model * model, const std::string & path, int32_t n_ctx, int32_t n_threads, bool write);

    static actqkv_memory memory_plan(const llama_model * model, const actqkv_params & params);

    const actqkv_params & parameters() const { return params; }
    const actqkv_params & answering_parameters() const { return answering; }
    void set_answering(const actqkv_method & method, int32_t budget);
    const history & past() const { return tokens; }
    int64_t n_chunks() const { return store.n_closed(); }

    // Appends tokens and computes; see actqkv_decode. Returns false when the progress callback said stop.
    bool decode(const int32_t * more, int64_t n, int32_t phase, float * logits, int64_t n_logits);
    void rewind(int64_t n_past);
    void keep_checkpoint();
    void repeat(int64_t n_tokens);

    // gpu.h: attention there where it fits, on the CPU otherwise.
    void use_gpu(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes);
    static actqkv_gpu_memory gpu_plan(const llama_model * model, const actqkv_params & params,
                                      const actqkv_cuda & cuda);
    const std::string & gpu_problem() const { return left_gpu.empty() && gpu != nullptr ? gpu->problem() : left_gpu; }

    void set_recorder(actqkv_record_fn fn, void * user, int32_t mass);
    void set_audit(int32_t every);
    void begin_sources();
    std::vector<double> end_sources();

    actqkv_stats stats() const;
    void reset_stats();

    // state.cpp
    uint64_t state_size() const;
    void state_get(uint8_t * data, uint64_t size) const;
    void state_set(const uint8_t * data, uint64_t size);

    // file.cpp
    void file_begin(const std::string & path, history && reading, const uint8_t * section, uint64_t section_bytes,
                    int32_t checkpoint_tokens);
    void file_spill(bool on);
    void file_sync();
    void file_end();
    void file_leave();

    actqkv_progress_fn progress = nullptr;
    void * progress_user = nullptr;
    actqkv_observe_fn watcher = nullptr;
    void * watcher_user = nullptr;

private:
    struct window {
        int64_t first;
        int m;
        bool decode;
        bool question;
        int n_out; // logits of the last n_out tokens
    };

    void check_tokens(const int32_t * more, int64_t n) const;
    bool run_pending(float * logits, int64_t n_logits);
    window run_next(int64_t first_out);
    void close_chunks(int64_t first);
    void run_window(const window & w);
    void run_layer(const window & w, int il);
    void plan_and_attend(const window & w, int il, const float * q_stored, const observer & observe);
    void make_spans(const window & w, int il, const chunk_plan & plan);
    void add_list(const window & w, int il, const int32_t * chunks, int32_t n_chunks);
    actqkv_attend_args attend_args(const window & w);
    void attend(const window & w, int il, const chunk_plan & plan);
    bool attend_on_gpu(const window & w, int il, const actqkv_attend_args & args, const chunk_plan & plan);
    bool answer_on_gpu(const window & w, int il, const float * q_stored);
    int32_t first_chunk_span(const window & w) const;
    void close_on_gpu();
    actqkv_attend_args summing_args(const window & w);
    void finish_attention(const window & w, int il, const actqkv_attend_args & args);
    int32_t most_chunks() const;
    void leave_gpu(const char * why);
    void reserve_scratch();

    // inspect.cpp
    actqkv_attend_args everything(const window & w, int il, int32_t lists);
    const std::vector<double> & true_mass(const window & w, int il, bool per_head);
    void record(const window & w, int il, const chunk_plan & plan);
    void begin_audit(const window & w);
    void audit(const window & w, int il, const chunk_plan & plan);
    bool counts_for_sources(const window & w) const { return recording && w.decode && w.first >= sources_from; }
    void keep_weights(actqkv_attend_args & args);
    void add_sources(const window & w, const actqkv_attend_args & args);

    void count_attended(const window & w, int il);
    void convert_window(int m);
    const float * stored_queries(int m);
    void learn_question(const window & w, int il);
    observer observer_of(int il, int64_t n_past) const;

    void truncate(int64_t n_past) {
        tokens.truncate(n_past);
        sources_from = std::min(sources_from, n_past);
    }
    checkpoint make_checkpoint() const;
    void restore(int64_t limit);
    void forget_hot();
    void before_window(const window & w);

    // file.cpp
    session(const llama_model * model, kv_file && file, int32_t n_ctx, int32_t n_threads, bool write);
    void take(std::shared_ptr<kv_file> file);
    void require_file() const;
    std::vector<uint8_t> make_payload() const;
    void write_closed();
    void write_checkpoint(bool complete);
    void write_what_is_due();
    int64_t last_window_start() const;
    void settle();

    const llama_model * model;
    hparams hp;
    actqkv_params params;    // of reading
    actqkv_params answering; // the same but for method and budget
    weights tensors;
    kv_store store;
    planner plans;
    runner graph;
    std::vector<layer_memory> memory; // [n_layer]
    checkpoints saved;

    std::unique_ptr<gpu_attention> gpu; // NULL: all on the CPU
    std::function<void()> make_gpu;     // the same for wider plans
    std::string left_gpu;               // why it is no longer used; empty: it is, or never was

    history tokens;
    int64_t n_done = 0; // tokens whose KV and statistics are in place; the rest of the history is pending

    // Buffers of the current window.
    std::vector<actqkv_f16> k_near, k_far, v; // [G][n_window][d]
    std::vector<float> q_turned;              // [n_window][H][d]; empty: chunks are f16
    std::vector<actqkv_span> spans;           // n_lists lists of equal length
    int32_t n_lists = 1;
    int first_summed = 0;    // first of a list's spans whose weights are summed
    int64_t summed_from = 0; // its first token
    std::vector<float> sums; // [H][n_local + n_window]
    std::vector<double> span_mass, chunk_mass;
    chunk_plan all_chunks; // to know their mass
    std::vector<uint8_t> scratch;

    bool recording = false;
    int64_t sources_from = 0;          // answered tokens before it have been counted, or are not to be
    std::vector<double> sources;       // [token]
    std::vector<float> source_weights; // [H][keys of one layer]
    std::vector<float> source_squares; // [keys of one layer]

    actqkv_record_fn recorder = nullptr;
    void * recorder_user = nullptr;
    int32_t recorded_mass = ACTQKV_MASS_NONE;

    int32_t audit_every = 0;
    int64_t n_audit_steps = 0, n_audit_turns = 0; // answered tokens and audits since audits were switched on
    int audit_layer = -1, audit_head = 0;         // of this window; -1: none

    std::shared_ptr<kv_file> file; // that the reading is written to; NULL: none
    history planned;               // all of the reading that the file is of
    bool spilling = false;         // written chunks leave memory
    int64_t n_written = 0;         // tokens before which all closed chunks, n_written_chunks of them, are in it
    int64_t n_written_chunks = 0;

    actqkv_stats counts = {};
    double attended_n = 0, dense_n = 0; // queries x layers behind attended_tokens_mean and dense_tokens_mean
};

} // namespace actqkv
