// kernels.h - what a window computes between graph segments, as plain functions on plain arrays.
//
// No ggml, no llama, no allocation that outlives a call, no global state. H query heads, G KV heads, r = H/G, head
// dimension d, window of m tokens, E = H*d channels. f16 arrays are IEEE half precision bits. All arrays are dense
// in the order written, the last index fastest, unless a stride is given in elements.
// cpu/NAME.cpp holds NAME: source, formula, a scalar loop a reader can check, then the fast version. `impl` chooses:
// actqkv_impl_best() is what runs; ACTQKV_IMPL_SCALAR is the checkable loop, for tests and for unknown machines. An
// impl that this processor or this build lacks runs as scalar.
// Results are bit-equal from run to run for a fixed n_threads and impl; they differ by rounding between those.
// Inputs and outputs must not overlap. Float arrays need the alignment of a float, scratch 64 bytes.
#ifndef ACTQKV_KERNELS_H
#define ACTQKV_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default) // the tests call every kernel through the cffi module

// [cdef begin]

typedef uint16_t actqkv_f16;

enum actqkv_impl {
    ACTQKV_IMPL_SCALAR = 0,
    ACTQKV_IMPL_AVX2 = 1,
    ACTQKV_IMPL_AVX512 = 2,
    ACTQKV_IMPL_NEON = 3,
    ACTQKV_IMPL_AVX512_VNNI = 4,
};

// The fastest implementation this processor can run.
int32_t actqkv_impl_best(void);

// dst[i] = half(src[i]), round to nearest even.
void actqkv_to_f16(int32_t impl, const float * src, actqkv_f16 * dst, int64_t n);

// ---- rows: keys and values as they are kept. The numbers are those of enum ggml_type.

enum actqkv_kv_type { ACTQKV_KV_F16 = 1, ACTQKV_KV_Q4_0 = 2, ACTQKV_KV_Q8_0 = 8 };

// Bytes of a row of n values; 0: no such type, or no such row of it (q8_0 and q4_0 take multiples of 16).
int64_t actqkv_row_bytes(int32_t type, int64_t n);

// Multiplies each row of n values by the Hadamard matrix H / sqrt(p), in segments of p: the largest power of two that
// divides n, 256 at most. Products of turned rows are those of the rows, and turning twice gives them back; but a
// channel that is larger than the others is spread over all.
void actqkv_turn(float * x, int64_t n_rows, int64_t n);

// Rows of n_values f16 as rows of `type`, one behind the other. turned: through actqkv_turn, unless type is f16.
void actqkv_store_rows(int32_t type, int32_t turned, const actqkv_f16 * src, int64_t n_rows, int64_t n_values,
                       uint8_t * dst);

// ---- probe (docs/algorithms.md 3.1, 3.2)

struct actqkv_running { // of one layer
    float * mean;       // [E]
    float * var;        // [E], population variance
    double n_tokens;    // seen so far, capped
    int64_t n_windows;  // seen so far
};

// Folds one window z [m][E] into the running statistics; n_windows == 0 marks the first. published: the published
// update, else pooled. cap: t_max >= 1, so that n_tokens stays <= 256*cap and published counts at most cap windows.
void actqkv_probe_update(int32_t impl, struct actqkv_running * running, const float * z, int32_t m, int64_t n_channels,
                         int32_t published, int32_t cap, int32_t n_threads);

// bias [m] and weights [m] (sum 1) of z [m][E] under the running statistics. weights are 1/m when the mean variance
// is 0 (bias is then 0) or not finite, or when the biases sum to 0 or are not finite.
void actqkv_probe_weights(int32_t impl, const struct actqkv_running * running, const float * z, int32_t m,
                          int64_t n_channels, float * bias, float * weights, int32_t n_threads);

// probe [E] = sum_i weights[i] * z[i]
void actqkv_probe_mix(int32_t impl, const float * z, const float * weights, int32_t m, int64_t n_channels,
                      float * probe, int32_t n_threads);

// ---- summarize (3.3)

// Summary of one closed chunk of c tokens. keys: f16, KV head g at keys + g*key_stride, then [c][d], without RoPE.
// sums: attention received, query head h at sums + h*sum_stride, then [c]. kind: enum actqkv_summary
// of actqkv.h: 0 per query head, 1 per KV head with its group's attention, 2 per KV head the mean of all keys.
// rep: f16 [H][d], [G][d] or, for bounds, [2][G][d] with the least values first, then the greatest (sums unused).
// *norm: length of rep as it meets the probe, i.e. with keys repeated to query heads; 0 for bounds.
void actqkv_summarize(int32_t impl, int32_t kind, int32_t n_representatives, const actqkv_f16 * keys,
                      int64_t key_stride, const float * sums, int64_t sum_stride, int32_t n_head, int32_t n_head_kv,
                      int32_t d_head, int32_t c, actqkv_f16 * rep, float * norm);

// ---- score (3.4)

// scores[b] = scale * probe . rep_b for each of n summaries [n][width] (f16). norms != NULL: a cosine, divided by
// norms[b] * probe_norm, 0 where that product is 0 or not finite. width is H*d, or G*d with a probe already summed
// over each group's query heads; probe_norm is the length of the probe in R^{H*d} in both cases (the summed probe has
// another length, which is why it is an argument); it is not read when norms is NULL.
void actqkv_score(int32_t impl, const float * probe, float probe_norm, const actqkv_f16 * reps, const float * norms,
                  int64_t n, int64_t width, float scale, float * scores, int32_t n_threads);

// ---- spread

// Bytes of a spread: a summary of where a chunk's keys lie in four bits per channel, and of how far they spread, for all
// KV heads. 0 for d_head beyond 1024.
int64_t actqkv_spread_bytes(int32_t n_head_kv, int32_t d_head);

// mean [G][d] of c >= 0 keys, given as actqkv_summarize takes them; 0 of none.
void actqkv_mean(const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head, int32_t c,
                 float * mean);

// The spread of one chunk of c keys. centre [G][d]: what all keys of the session have in common, taken off before rounding;
// it must be the same for all spreads that are compared.
void actqkv_spread(const actqkv_f16 * keys, int64_t key_stride, const float * centre, int32_t n_head_kv, int32_t d_head,
                   int32_t c, uint8_t * spread);

// Floats of a query as spreads meet it; and the query [H][d], as its keys meet it, in that form.
int64_t actqkv_spread_query_size(int32_t n_head_kv, int32_t d_head);
void actqkv_spread_query(const float * query, int32_t n_head, int32_t n_head_kv, int32_t d_head, float * folded);

// scores[i], i < n: the query's products with the mean of chunk i less the centre, and as much more as keys reach that
// spread so far, summed over query heads. The fast versions round the query to 16 bits,
// per 32 values.
void actqkv_spread_scores(int32_t impl, const float * folded, const uint8_t * spreads, int64_t n, int32_t n_head_kv,
                          int32_t d_head, float * scores, int32_t n_threads);

// ---- vote (section 4)

// scores [H][n] of every query head: queries [H][width] against the n summaries of its block of rows, [n][width] (f16)
// at reps + i*block_stride for block i < n_blocks; block i serves the H/n_blocks query heads from i*H/n_blocks on.
void actqkv_head_scores(int32_t impl, const float * queries, const actqkv_f16 * reps, int64_t block_stride,
                        int32_t n_blocks, int64_t n, int64_t width, int32_t n_head, float * scores, int32_t n_threads);

// votes [G][n] from scores [H][n]: the logarithm of the greatest (sum: of the sum), over a KV head's query heads, of
// the softmax over chunks. Logarithms order alike and do not underflow.
void actqkv_vote(int32_t impl, const float * scores, int64_t n, int32_t n_head, int32_t n_head_kv, int32_t sum,
                 float * votes, int32_t n_threads);

// ---- cells: an index of the keys of a stretch of consecutive chunks

// Bytes of a stretch of one KV head with n_keys keys: divided into cells of keys that are alike (in_order 0), or with room for
// so many keys in order, in chunks of in_order. 0 where d_head is no multiple of 16 or beyond 1024, or n_keys is beyond 2^20.
int64_t actqkv_stretch_bytes(int32_t d_head, int64_t n_keys, int32_t in_order);

// Cells that such a stretch has at most.
int64_t actqkv_stretch_cells(int64_t n_keys, int32_t in_order);

// The divided stretch of n_chunks chunks of c keys: [n_chunks][c] rows of `type` (turned unless f16), chunks chunk_stride bytes
// apart. common [d], not turned: what all keys of the session have in common, taken off before centres are rounded; it must be
// the same for all stretches that are searched together. stretch: 4-byte aligned; scratch: actqkv_stretch_scratch() bytes of as
// many keys, 64-byte aligned. Which keys share a cell may differ between impls, by rounding.
uint64_t actqkv_stretch_scratch(int32_t d_head, int64_t n_keys);
void actqkv_make_stretch(int32_t impl, int32_t type, const uint8_t * keys, int64_t chunk_stride, int32_t c,
                         int32_t n_chunks, const float * common, int32_t d_head, uint8_t * stretch, void * scratch);

// The same of keys in order, chunk by chunk: adds the next one's c keys to a stretch with room for n_keys, which has `chunk` of
// them; 0 begins it anew.
void actqkv_add_chunk(int32_t impl, int32_t type, const uint8_t * keys, int32_t c, const float * common, int32_t d_head,
                      int64_t n_keys, int64_t chunk, uint8_t * stretch, void * scratch);

// Whether a search stays within a divided stretch that comes from elsewhere, and finds only chunks that it has; any alignment.
int32_t actqkv_stretch_is_sound(const uint8_t * stretch, int32_t d_head, int64_t n_keys, int32_t c);

// ---- search: which chunks hold the keys that a query attends to

struct actqkv_stretch {
    const uint8_t * data; // KV head g's at data + g*head_stride, 4-byte aligned
    int64_t head_stride;
    int64_t first_chunk;
    int64_t n_keys;   // or, of one in order, for how many it has room
    int32_t in_order; // 0: divided; else the keys of a chunk: all of its keys are looked at
};

struct actqkv_search_args {
    int32_t n_head, n_head_kv, d_head;
    float scale;                             // of q . k
    const float * query;                     // [H][d] as its keys meet it, not turned
    const struct actqkv_stretch * stretches; // divided ones first; chunks [0, n_chunks), each in one stretch
    int32_t n_stretches;
    int64_t n_chunks;
    int64_t n_cells;  // row length of scores: at least actqkv_search_cells() of every KV head
    float * scores;   // [H][n_cells], of which each KV head's own cells count
    int32_t n_picked; // divided cells that each query head looks into
    int32_t * picked; // [H][n_picked] which, ascending; -1 behind the last, where there are fewer
    float * votes;    // [n_chunks]
    void * scratch;   // actqkv_search_scratch() bytes, 64-byte aligned
    int32_t n_threads;
};

// Cells of KV head g in all stretches, in order; *n_divided: of those that are divided.
int64_t actqkv_search_cells(const struct actqkv_stretch * stretches, int32_t n_stretches, int32_t g, int32_t d_head,
                            int64_t * n_divided);

// For these stretches and sizes; grows with n_threads * (n_chunks + n_cells + 768 * n_picked) * 4.
uint64_t actqkv_search_scratch(const struct actqkv_search_args * args);

// One after the other with the same args, scratch untouched between them.
// scores: how well keys of a cell may do.
void actqkv_search_score(int32_t impl, const struct actqkv_search_args * args);
// picked: the cells of the best scores. votes: for each chunk, the attention that its keys would have among the keys looked at,
// as sketches have them, summed over query heads; keys of less than a head's mean weight are left out. What four channels of a
// query give is rounded, in every impl alike, to 1/63 of the most that any four can. Returns the bytes of sketches that were
// read, each head's.
uint64_t actqkv_search_vote(int32_t impl, const struct actqkv_search_args * args);

// ---- refine

// scores [H][n]: scale times the greatest q_h . k among the keys of chunk chunks[i], i < n. query [H][d];
// keys [chunk][G][c], rows of `type`; where they are turned, so is the query. Against q8_0 and q4_0 keys the fast versions
// round each query to 16 bits, per 32 values.
void actqkv_refine(int32_t impl, const float * query, int32_t type, const uint8_t * keys, const int32_t * chunks,
                   int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t c, float scale, float * scores,
                   int32_t n_threads);

// ---- cut-off (3.5, 3.6)

// Entropy of softmax(scores / temperature) divided by ln n, in [0, 1]; 0 for n <= 1, for a score that is not finite
// and for a temperature that is not positive.
float actqkv_entropy(int32_t impl, const float * scores, int64_t n, float temperature);

// The min(k, n) best of n scores, ties to the lower index, indices ascending. NaN is worse than all. scratch: n int32.
void actqkv_top_k(int32_t impl, const float * scores, int64_t n, int32_t k, int32_t * chosen, int32_t * scratch);

// ---- attend (section 1 and 2)

// A run of past tokens. K of KV head g: far + g*far_stride (as stored, met by q_far) and near + g*near_stride (RoPE
// at the true position, met by q_near), n_tok rows of kv_type each; strides in bytes. far == NULL: always near. near ==
// NULL: always far. Keys of another kv_type than f16 are of one of the two, and met by q_turned.
// Both: near while position(query) - position(key) < n_clamp, else far. n_tok may be 0. Queries share each read of K
// and V best when spans of one sort (only far, only near, both) follow each other.
// One list of spans may serve all KV heads, or each has its own; then span s of every list has the same n_tok >= 1 and
// is of the same sort, and what is of sort "both" is the same span in all.
struct actqkv_span {
    const uint8_t * far;
    const uint8_t * near;
    const uint8_t * v;
    int64_t far_stride, near_stride, v_stride;
    int64_t first; // position of its first token
    int32_t n_tok;
    int32_t kv_type; // enum actqkv_kv_type
};

struct actqkv_attend_args {
    int32_t n_head, n_head_kv, d_head;
    int32_t m;              // queries
    int64_t n_past;         // position of the window's first query; span keys all lie before it
    int64_t n_clamp;        // n_local; see actqkv_span
    float scale;            // of q . k
    const float * q_near;   // [m][H][d] RoPE at the true position
    const float * q_far;    // [m][H][d] RoPE at the fixed distance; may be q_near's equal
    const float * q_turned; // [m][H][d] what keys of another type than f16 meet; NULL where there are none
    const struct actqkv_span * spans;
    int32_t n_spans;
    int64_t span_stride;         // KV head g's list is at spans + g*span_stride; 0: one list for all
    const actqkv_f16 * k_window; // [G][m][d] the window's own keys at their true positions, seen causally
    const actqkv_f16 * v_window; // [G][m][d]
    int64_t window_stride;       // elements between KV heads of k_window and v_window
    float * out;                 // [m][H][d]
    int32_t first_summed;        // spans from this one on, then the window, have their weights summed ...
    float * weight_sums;         // ... over queries into [H][sum_stride], columns in that order, overwritten (only
                                 // these columns); NULL: not wanted
    int64_t sum_stride;
    double * span_mass; // [n_spans] softmax mass summed over queries, averaged over heads, overwritten; NULL:
                        // not wanted. With a list per KV head [G][span_stride]: each head's own part of that average
    int32_t n_threads;
    void * scratch; // actqkv_attend_scratch() bytes, 64-byte aligned
};

// Bytes of scratch for any impl and at most n_keys keys (spans and window together) and m queries. Grows with
// n_keys by at most 12 bytes per key and thread: about 4 MB per thread at 2K keys, 6 MB at 128K (d 128, r 4, m 256).
uint64_t actqkv_attend_scratch(int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t m, int64_t n_keys,
                               int32_t n_threads);

// out_i = softmax over the union of all spans and the window keys j <= i of (scale * q.k), times V. One softmax.
void actqkv_attend(int32_t impl, const struct actqkv_attend_args * args);

// [cdef end]

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif // ACTQKV_KERNELS_H
