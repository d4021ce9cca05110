// actqkv.h - the C API of libactqkv, a companion to llama.h.
//
// An actqkv_session reads and writes tokens over a loaded llama_model, like a llama_context does, but keeps
// the KV of every token as chunks in CPU RAM and attends only sinks + retrieved chunks + local per step.
//
//   engine  = the llama_model: weights, tokenizer, template. Loaded by libllama, shared, read-only.
//   session = one history of tokens over a model: KV store, summaries, statistics, checkpoints. Owned by the caller.
//
// Errors: every function that can fail returns an actqkv_status and fills `err` (may be NULL). Nothing here aborts.
// Threads: a session is used by one thread at a time; different sessions over one model may run in parallel.
// Words: window, sink, local, chunk, summary, probe, score, cut-off, plan, method, budget (native/README.md).
#ifndef ACTQKV_H
#define ACTQKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ACTQKV_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// [cdef begin] bindings/build_ffi.py hands everything between these marks to cffi as it stands
// clang-format off: columns

struct llama_model;
typedef struct actqkv_session actqkv_session;

enum actqkv_status {
    ACTQKV_OK            = 0,
    ACTQKV_ERR_ARGUMENT  = 1, // a parameter is out of range or contradicts another
    ACTQKV_ERR_MODEL     = 2, // the graph lacks this architecture or one of its tensors: run it through llama.cpp
    ACTQKV_ERR_MEMORY    = 3, // an allocation failed, or the plan exceeds what was allowed
    ACTQKV_ERR_FULL      = 4, // the tokens do not fit n_ctx; the session is unchanged
    ACTQKV_ERR_STATE     = 5, // a state blob or KV file is damaged, truncated, or of another model or parameters
    ACTQKV_ERR_CANCELLED = 6, // the progress callback said stop; completed windows are kept
    ACTQKV_ERR_COMPUTE   = 7, // ggml reported a failed computation
    ACTQKV_ERR_INTERNAL  = 8, // a defect of ours; the message says where
    ACTQKV_ERR_FILE      = 9, // a KV file cannot be made, opened or written: the system's reason
};

struct actqkv_error {
    int32_t status;       // enum actqkv_status
    char    message[500]; // what, expected, actual; UTF-8, always terminated
};

// How a token entered the history. Part of the history: the same tokens read another way give other results.
enum actqkv_phase {
    ACTQKV_PREFILL  = 0, // windows of up to n_window tokens, cut at absolute multiples of n_window
    ACTQKV_DECODE   = 1, // windows of one token; statistics are not updated, the cut-off applies
    ACTQKV_QUESTION = 2, // as prefill, and these tokens' queries become the question of question-aware prefill
};

// Columns of the table of methods (docs/algorithms.md section 6). A method is a row; every column is also a parameter.
enum actqkv_positions { ACTQKV_POSITIONS_AUTO = 0, ACTQKV_POSITIONS_CLAMPED = 1, ACTQKV_POSITIONS_EXACT = 2 };
enum actqkv_retrieval {
    ACTQKV_RETRIEVE_ALL    = 0,
    ACTQKV_RETRIEVE_TOP    = 1, // the best by score
    ACTQKV_RETRIEVE_NONE   = 2,
    ACTQKV_RETRIEVE_ORACLE = 3, // those of the largest true attention mass: attends everything to know it
};
enum actqkv_summary {
    ACTQKV_SUMMARY_HEAD    = 0, // per query head, the mean of its n_representatives most attended keys: H*d numbers
    ACTQKV_SUMMARY_KV_HEAD = 1, // per KV head, the same with its group's attention: G*d numbers
    ACTQKV_SUMMARY_MEAN    = 2, // per KV head, the mean of all keys: G*d numbers
    ACTQKV_SUMMARY_BOUNDS  = 3, // per KV head, the least and the greatest of each channel: 2*G*d numbers. The product
                                // is then Quest's upper bound, for which SCORE_DOT is required
    ACTQKV_SUMMARY_SPREAD  = 4, // per KV head, the mean of all keys in 4 bits per channel, and one number for how far
                                // they spread around it. Goes with SCORE_DOT and GRANULARITY_LAYER
};
enum actqkv_keys {
    ACTQKV_KEYS_UNROTATED = 0, // summaries are of keys without RoPE, probes of queries at the fixed distance
    ACTQKV_KEYS_ATTENDED  = 1, // of keys and queries as attention beyond local has them: exact positions rotate both
};
enum actqkv_probe { ACTQKV_PROBE_MEAN = 0, ACTQKV_PROBE_BIAS = 1 };
enum actqkv_score { ACTQKV_SCORE_COSINE = 0, ACTQKV_SCORE_DOT = 1 };
enum actqkv_statistics { ACTQKV_STATISTICS_POOLED = 0, ACTQKV_STATISTICS_PUBLISHED = 1 };
enum actqkv_cutoff { ACTQKV_CUTOFF_NONE = 0, ACTQKV_CUTOFF_LAYERWISE = 1, ACTQKV_CUTOFF_PUBLISHED = 2 };
enum actqkv_granularity {
    ACTQKV_GRANULARITY_LAYER   = 0, // one list of chunks for all heads: their products are added up
    ACTQKV_GRANULARITY_KV_HEAD = 1, // one list per KV head, by a vote of its group's query heads. Goes with SCORE_DOT,
                                    // neither scan nor refine, no cut-off and no question
};
enum actqkv_vote { ACTQKV_VOTE_MAX = 0, ACTQKV_VOTE_SUM = 1 }; // of the softmax over chunks of each query head's scores

struct actqkv_method {
    char    name[32];
    int32_t positions;          // enum actqkv_positions; AUTO: exact if n_ctx fits the trained length, else clamped
    int32_t prefill;            // enum actqkv_retrieval while reading
    int32_t decode;             // enum actqkv_retrieval while answering
    int32_t summary;            // enum actqkv_summary
    int32_t n_representatives;  // keys averaged into a summary, 1 .. n_chunk_tokens
    int32_t probe;              // enum actqkv_probe
    int32_t probe_warmup;       // windows per layer whose probe is the plain mean (published: 1000 / n_layer)
    int32_t statistics;         // enum actqkv_statistics
    int32_t statistics_cap;     // t_max: running statistics remember at most t_max * 256 tokens (published: windows)
    int32_t score;              // enum actqkv_score
    int32_t scan;               // answering: keys that each query head looks at, in cells of those that are like what it seeks;
                                // their attention chooses chunks. 0: off, summaries choose
    int32_t refine;             // answering: of the refine * share best chunks, their keys choose; 1: off
    int32_t cutoff;             // enum actqkv_cutoff
    float   cutoff_temperature; // softmax(score / temperature), > 0
    float   question_weight;    // lambda of question-aware prefill; 0: off
    int32_t summary_keys;       // enum actqkv_keys
    int32_t granularity;        // enum actqkv_granularity
    int32_t vote;               // enum actqkv_vote, of GRANULARITY_KV_HEAD
    int32_t n_dense_layers;     // the first layers attend all chunks always, 0 .. n_layer; they share no budget
    int32_t n_chunk_tokens;     // tokens of a chunk, 1 .. 1024
};

struct actqkv_params {
    struct actqkv_method method;
    int32_t n_ctx;          // tokens the session can hold
    int32_t n_threads;      // >= 1
    int32_t n_window;       // tokens of a prefill window, 1 .. n_local
    int32_t n_sink;         // first tokens, always attended
    int32_t n_local;        // last tokens, always attended
    int32_t budget;         // sinks + local + retrieved tokens per step, at least n_sink + n_local + one chunk
    int32_t kv_type;        // enum ggml_type of closed chunks: F16 (1), Q8_0 (8) or Q4_0 (2)
};

// Bytes a session will need at most, all of n_ctx in use. Compute buffers follow the window, not the context.
struct actqkv_memory {
    uint64_t kv_bytes;         // K and V of n_ctx tokens
    uint64_t summary_bytes;    // summaries of all chunks, and the index of their keys
    uint64_t checkpoint_bytes; // what rewind keeps
    uint64_t compute_bytes;    // graph and attention buffers, logits of one token, statistics
};

// Time and traffic since the last reset, summed over windows. A stage's bytes are what its inner loop must read.
struct actqkv_stage { double ms; uint64_t bytes; };
// Attention on a GPU. The last three are as things stand, not since the last reset; all is 0 without a GPU.
struct actqkv_gpu_stats {
    uint64_t n_calls;      // attentions that ran there, one per layer and window
    uint64_t n_hits;       // planned chunks that were there, or on their way
    uint64_t n_misses;     // planned chunks that were not
    uint64_t n_prefetched; // chunks copied on a guess
    uint64_t n_wasted;     // of these, how many left again unused
    uint64_t n_stalls;     // attentions that had to wait for a miss
    uint64_t to_bytes;     // over the bus: chunks, open blocks, queries
    uint64_t from_bytes;   // and back
    double   wait_ms;      // that the host waited for attention, copies included
    int64_t  n_slots;      // chunks of a layer that have room there
    uint64_t memory_bytes; // taken of the GPU's
    uint64_t pinned_bytes; // of the CPU's
    uint64_t n_planned;    // of the attentions, those whose plan was made there
};
struct actqkv_stats {
    uint64_t n_prefill_tokens, n_decode_tokens, n_windows, n_replayed_tokens;
    double   prefill_ms, decode_ms;
    struct actqkv_stage graph, probe, score, refine, attend, append, summarize;
    uint64_t attended_tokens_max;  // of any one query: sinks + plan + remainder + local + window; dense layers apart
    double   attended_tokens_mean; // over queries and layers, dense layers apart
    uint64_t dense_tokens_max;     // the same two of the n_dense_layers first layers; 0 where there are none
    double   dense_tokens_mean;
    uint64_t n_audits;
    double   audit_ms;          // outside the stages
    double   audit_recall;      // mean of them; 0 where there are none
    double   audit_recall_last; // of KV head audit_head in layer audit_layer
    int32_t  audit_layer, audit_head;
    struct actqkv_gpu_stats gpu;
};

// What one layer did in one window, to be recorded. Pointers are valid during the call only; NULL where the method has
// no such thing. Chunk b is the tokens [n_sink + b*c, n_sink + (b+1)*c) of the history.
struct actqkv_record {
    int64_t         n_past;   // the window's first token
    int32_t         n_tokens; // of the window: m
    int32_t         phase;    // enum actqkv_phase
    int32_t         layer;
    int32_t         n_lists;  // 1: a list of chunks for all heads; G: one per KV head
    int64_t         n_chunks; // N that could be retrieved
    int64_t         n_chosen; // of each list: the layer's share
    const int32_t * chosen;   // [n_lists][n_chosen], each list ascending; NULL where n_chosen is N or 0
    const float *   bias;     // [m] activation bias, of probe BIAS while reading
    const float *   weights;  // [m] of the window's queries in the probe, while reading
    const double *  mass;     // [n_lists][N] true attention mass, where asked for: summed over the window's queries,
                              // averaged over all heads of the layer (of lists: each KV head's part of that average)
    float           entropy;  // of the softmax over scores, 0 .. 1, as the cut-off has it; NaN: no cut-off, or N <= 1
};
enum actqkv_mass { ACTQKV_MASS_NONE = 0, ACTQKV_MASS_ANSWERS = 1, ACTQKV_MASS_ALL = 2 }; // of which windows

// After each window with tokens done / asked for in this call. Return false to stop with ACTQKV_ERR_CANCELLED.
typedef bool (*actqkv_progress_fn)(void * user, int64_t n_done, int64_t n_total);

// One named array of one layer of the current window, f32, dense, ne[0] fastest. Valid during the call only.
// q [d,H,m] k [d,G,m] v [d,G,m] before RoPE; mean var [H*d]; bias weights [m]; probe [H*d]; scores [N]; entropy [1];
// share [1] chunks granted; plan [n]; out [H*d,m]. Per KV head: head_scores [N,H], votes [N,G] (logarithms) and plans
// [n,G] in place of scores and plan. mass [N], per KV head [N,G]: true attention mass, where it decides.
typedef void (*actqkv_observe_fn)(void * user, const char * name, int32_t layer, int64_t n_past, const float * data,
                                  const int64_t * ne);

// Once per window and layer, before the layer attends.
typedef void (*actqkv_record_fn)(void * user, const struct actqkv_record * record);

// ---- methods

// The table. Returns the number of rows; row i is copied to `method` where it is not NULL and i is in range.
ACTQKV_API int32_t actqkv_method_table(int32_t i, struct actqkv_method * method);

// ACTQKV_ERR_ARGUMENT names the known methods when `name` is none of them.
ACTQKV_API int32_t actqkv_method_find(const char * name, struct actqkv_method * method, struct actqkv_error * err);

// Of n_chunks, into how many cells each query head of an answering step looks (0: chunks are chosen by summaries), and how many
// chunks it looks at the keys of, where it may attend `share` of them in a layer. ACTQKV_ERR_ARGUMENT where share is below 1 or
// n_chunks negative.
ACTQKV_API int32_t actqkv_method_candidates(const struct actqkv_method * method, int64_t share, int64_t n_chunks,
                                            int64_t * n_picked, int64_t * n_refined, struct actqkv_error * err);

// Defaults of docs/algorithms.md section 1 with method `actqkv`; n_ctx 0 must be set by the caller.
ACTQKV_API struct actqkv_params actqkv_default_params(void);

// ---- session

// ACTQKV_ERR_MODEL with the reason when our graph cannot compute this model exactly.
ACTQKV_API int32_t actqkv_model_check(const struct llama_model * model, struct actqkv_error * err);

// What a session with these parameters would need; checks them as actqkv_session_new does and allocates nothing.
ACTQKV_API int32_t actqkv_memory_plan(const struct llama_model * model, const struct actqkv_params * params,
                                      struct actqkv_memory * memory, struct actqkv_error * err);

// The model must outlive the session. KV memory is reserved for n_ctx tokens and committed as tokens arrive.
ACTQKV_API int32_t actqkv_session_new(const struct llama_model * model, const struct actqkv_params * params,
                                      actqkv_session ** session, struct actqkv_error * err);
ACTQKV_API void actqkv_session_free(actqkv_session * session); // NULL is fine

// The parameters of reading and of answering; positions resolved from AUTO.
ACTQKV_API struct actqkv_params actqkv_session_params(const actqkv_session * session);
ACTQKV_API struct actqkv_params actqkv_session_answering(const actqkv_session * session);
ACTQKV_API int64_t actqkv_n_past(const actqkv_session * session);
ACTQKV_API int64_t actqkv_n_chunks(const actqkv_session * session); // retrievable now

// Copies tokens [from, from + n) of the history to tokens and their enum actqkv_phase to phases; NULL skips one.
ACTQKV_API int32_t actqkv_history(const actqkv_session * session, int64_t from, int64_t n, int32_t * tokens,
                                  int8_t * phases, struct actqkv_error * err);

// Appends n tokens. logits: n_logits rows of n_vocab floats for the last n_logits of them, 0 <= n_logits <= n.
// Prefill that continues an unfinished window reads that window's tokens again with the new ones, so that the
// result does not depend on how a text was cut into calls. On error other than CANCELLED the history is unchanged.
ACTQKV_API int32_t actqkv_decode(actqkv_session * session, const int32_t * tokens, int64_t n, int32_t phase,
                                 float * logits, int64_t n_logits, struct actqkv_error * err);

// Answers (ACTQKV_DECODE) by `method` at `budget` from now on; reading stays as it was, and so do the tokens answered
// before, except those that a rewind has to read again. Steps then equal those of a session made with `method` and, for
// reading, this session's budget. For that the stores must be equal, else ACTQKV_ERR_ARGUMENT names what differs and
// nothing changes:
//   - n_chunk_tokens, positions (AUTO resolved) and prefill agree; where prefill is not ALL, n_dense_layers too;
//   - where prefill or the new decode is TOP: the session made summaries, and summary, summary_keys, granularity (and
//     n_representatives of summaries that have them) agree; a method that scans needs a session that has an index;
//   - where prefill is TOP: all that steers it agrees (probe, its warm-up and statistics, score, vote, question_weight),
//     and a method with a cut-off finds entropies of its own temperature.
// Free are decode, scan, refine, budget, cut-off within the above, and the columns of scoring where prefill is not TOP.
ACTQKV_API int32_t actqkv_set_answering(actqkv_session * session, const struct actqkv_method * method, int32_t budget,
                                        struct actqkv_error * err);

// Forgets all tokens from n_past on. The next decode equals a fresh run over the remaining history: the nearest
// checkpoint is restored at once, the tokens after it are read again by the next decode.
ACTQKV_API int32_t actqkv_rewind(actqkv_session * session, int64_t n_past, struct actqkv_error * err);

// Keeps a checkpoint here, so that a later rewind to this point reads nothing again (end of a document or turn).
ACTQKV_API int32_t actqkv_checkpoint(actqkv_session * session, struct actqkv_error * err);

// For measurements at lengths that would take hours to read: the history becomes n_tokens long, by copies of its closed
// chunks and their tokens behind these. A step then costs what it does after a reading; what it says means nothing.
// Both lengths are whole windows, and what is added is whole chunks. ACTQKV_ERR_ARGUMENT where they are not, no chunk is
// closed, tokens are still to be read, positions are exact, or chunks are those of a KV file; ACTQKV_ERR_FULL. The session
// is then unchanged. It cannot be rewound to before the end.
ACTQKV_API int32_t actqkv_repeat(actqkv_session * session, int64_t n_tokens, struct actqkv_error * err);

ACTQKV_API void actqkv_set_progress(actqkv_session * session, actqkv_progress_fn fn, void * user); // NULL: off
ACTQKV_API void actqkv_set_observer(actqkv_session * session, actqkv_observe_fn fn, void * user);  // NULL: off

// Records every window from now on; NULL stops. mass: enum actqkv_mass; such a window attends everything once more in
// every layer, to know the mass, and the session then takes scratch for n_ctx keys. Recording changes no result, and
// costs a branch per layer while it is off.
ACTQKV_API int32_t actqkv_set_recorder(actqkv_session * session, actqkv_record_fn fn, void * user, int32_t mass,
                                       struct actqkv_error * err);

// Every `every`-th answered token (0: off), one KV head of one layer attends everything once more, and the share of its
// true mass over all chunks that fell on the chosen ones joins the statistics; the heads of all layers that retrieve
// take turns. Changes no result. ACTQKV_ERR_ARGUMENT when `every` is negative.
ACTQKV_API int32_t actqkv_set_audit(actqkv_session * session, int32_t every, struct actqkv_error * err);

// ---- on a GPU

struct actqkv_cuda; // kernels/cuda/kernels_cuda.h

// Bytes of a GPU's memory that a session's attention takes, and its graphs where layers are on a GPU; beside weights and
// some hundred MB of CUDA's own.
struct actqkv_gpu_memory {
    uint64_t window_bytes; // graphs, queries, results, open blocks of all layers
    uint64_t least_bytes;  // with as many chunks as a step attends
    uint64_t useful_bytes; // with all chunks of n_ctx tokens: more is of no use
    uint64_t planning_bytes; // from so many on, answering steps are planned there too; 0: not by this method
};

ACTQKV_API int32_t actqkv_gpu_memory_plan(const struct llama_model * model, const struct actqkv_params * params,
                                   const struct actqkv_cuda * cuda, struct actqkv_gpu_memory * plan,
                                   struct actqkv_error * err);

// From now on attention runs on that GPU, by the functions of the table, within limit_bytes of its memory, and answering
// steps are planned there where the limit has room for what plans are made of, unless they are watched, recorded or
// audited. The store stays on the CPU, and so does attention with a list of chunks per KV head, or to everything. Results
// are the CPU's but for rounding. ACTQKV_ERR_MEMORY names what is needed where the limit or the GPU is too small, and the session
// goes on without. Where the GPU fails later, the session goes on without it too: nothing is lost, and
// actqkv_gpu_problem says why. Memory of closed chunks is pinned as it fills, unless a KV file stands for it. The table
// must outlive the session.
ACTQKV_API int32_t actqkv_use_gpu(actqkv_session * session, const struct actqkv_cuda * cuda, int32_t device,
                                  uint64_t limit_bytes, struct actqkv_error * err);
// What did not go as planned there, in one line; empty: nothing. Valid until the session's next call.
ACTQKV_API const char * actqkv_gpu_problem(const actqkv_session * session);

// ---- state: one self-contained blob, checked against model and parameters when it is set

ACTQKV_API uint64_t actqkv_state_size(const actqkv_session * session);
ACTQKV_API int32_t actqkv_state_get(const actqkv_session * session, uint8_t * data, uint64_t size,
                                    struct actqkv_error * err);
// ACTQKV_ERR_STATE leaves the session unchanged.
ACTQKV_API int32_t actqkv_state_set(actqkv_session * session, const uint8_t * data, uint64_t size,
                                    struct actqkv_error * err);

// ---- KV files (.akv): one reading on disk, checked against the model when it is opened. native/kv/file.h has the format

// A reading in a file. The caller's section is opaque bytes: the text, where it lies among the tokens.
struct actqkv_file_info {
    struct actqkv_params params; // of the reading; positions resolved; n_ctx and n_threads mean nothing
    int64_t  n_tokens;           // of the whole reading
    int64_t  n_done;             // of them the last checkpoint has; the others are read after opening
    int64_t  n_chunks;           // closed
    int32_t  complete;           // 1: the file was ended; 0: a reading is under way, or was stopped
    int32_t  version;
    uint64_t section_bytes;
    uint64_t file_bytes;         // as large as the complete file; what is not written yet takes no room
};

// Needs no model. Checks all but chunks and the section; ACTQKV_ERR_FILE, ACTQKV_ERR_STATE.
ACTQKV_API int32_t actqkv_file_info(const char * path, struct actqkv_file_info * info, struct actqkv_error * err);
// Copies the reading's tokens [n_tokens], enum actqkv_phase of each, and the section [section_bytes]; NULL skips one.
ACTQKV_API int32_t actqkv_file_read(const char * path, int32_t * tokens, int8_t * phases, uint8_t * section,
                                    struct actqkv_error * err);
// Checks every byte that is in use. progress counts bytes; NULL: none.
ACTQKV_API int32_t actqkv_file_verify(const char * path, actqkv_progress_fn progress, void * user,
                                      struct actqkv_error * err);

// A session where the file's reading stands: the tokens up to its last checkpoint, all of them where it is complete.
// Chunks are mapped, not read: they cost memory as they are attended, which processes share, and are checked then
// (ACTQKV_ERR_STATE from actqkv_decode). What the session reads from now on stays in memory, except with `write`: then
// what is left of the reading goes to the file, as after actqkv_file_begin; another writer is ACTQKV_ERR_FILE.
// Answering is by the method of reading. ACTQKV_ERR_FULL where n_ctx is less than the reading.
ACTQKV_API int32_t actqkv_session_open(const struct llama_model * model, const char * path, int32_t n_ctx,
                                       int32_t n_threads, bool write, actqkv_session ** session,
                                       struct actqkv_error * err);

// Makes the file of a reading: its tokens and phases [n_tokens], of which the session has read none, some or all.
// From now on actqkv_decode writes it at window boundaries at least checkpoint_tokens apart, and a thread waits for the
// disk, for which the reading waits only when it is 4 such distances ahead; a process that is killed loses what came after
// the last checkpoint on the disk, and a session opened with `write` reads on from there with equal results.
// ACTQKV_ERR_FILE from actqkv_decode where the disk is full: the file is as at its last checkpoint.
ACTQKV_API int32_t actqkv_file_begin(actqkv_session * session, const char * path, const int32_t * tokens,
                                     const int8_t * phases, int64_t n_tokens, const uint8_t * section,
                                     uint64_t section_bytes, int32_t checkpoint_tokens, struct actqkv_error * err);
// Whether chunks leave memory as they are written; the file then stands for them, unlike after opening without their checksums
// being looked at. Off when a file is begun.
ACTQKV_API int32_t actqkv_file_spill(actqkv_session * session, bool on, struct actqkv_error * err);
// Writes a checkpoint at the last window's start, and waits until it is on the disk. The tokens of an unfinished last window
// are read again by the next actqkv_decode.
ACTQKV_API int32_t actqkv_file_sync(actqkv_session * session, struct actqkv_error * err);
// The same, of a reading that is all read; the file is complete then, and no longer the session's.
ACTQKV_API int32_t actqkv_file_end(actqkv_session * session, struct actqkv_error * err);
// The file is no longer the session's, complete or not, and another session may write it on. Nothing where there is none.
ACTQKV_API void actqkv_file_leave(actqkv_session * session);

// ---- what was attended

// From now on sum, for every token of the past, the squares of the attention weights that answered tokens (ACTQKV_DECODE)
// give it, averaged over heads and layers. Squares, so that heads which have found something decide. Tokens that were
// answered before, and those that a rewind has read again, do not count. Changes no result.
ACTQKV_API void actqkv_sources_begin(actqkv_session * session);
// Copies the sums of up to n tokens, from the first on, returns how many there are (0: nothing was answered), and stops.
ACTQKV_API int64_t actqkv_sources_end(actqkv_session * session, double * weights, int64_t n);

ACTQKV_API struct actqkv_stats actqkv_stats_get(const actqkv_session * session);
ACTQKV_API void actqkv_stats_reset(actqkv_session * session);

// ---- machine

// Multiplies small quantised matrices in every extra buffer type of the CPU (repacked, AMX) and compares them with
// plain buffers. May die by a signal on a broken build: call it in a child process. Returns ACTQKV_OK when all agree.
ACTQKV_API int32_t actqkv_try_extra_buffers(struct actqkv_error * err);

// Name of the instruction set the kernels dispatch to here: "avx512-vnni", "avx512", "avx2", "neon" or
// "scalar".
ACTQKV_API const char * actqkv_kernel_name(void);

// Whether the kernels were built to run on several threads; 0: on one, whatever a session's n_threads is.
ACTQKV_API int32_t actqkv_has_threads(void);

// clang-format on
// [cdef end]

#ifdef __cplusplus
}
#endif

#endif // ACTQKV_H
