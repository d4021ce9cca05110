// The forward pass of the llama family as ggml graphs, cut where attention happens (one segment per cut).
//
//   segment 0        x = embedding(tokens);                    norm, q k v of layer 0
//   segment l        x += wo(attention of l-1); x += ffn(x);   norm, q k v of layer l
//   segment L        x += wo(attention of L-1); x += ffn(x);   norm, head: logits of the last n_out tokens
//
// The graph knows nothing of retrieval: it takes positions and attention outputs, and gives q, k, v in every rotation
// that attention can ask for.
#pragma once

#include "../model/weights.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <vector>

namespace actqkv {

// What segments exchange with the outside and with each other; host memory of the session, room for n_window tokens.
struct window_tensors {
    int32_t * token;        // [m]
    int32_t * position;     // [m] true position
    int32_t * far_position; // [m] the fixed distance n_local
    int32_t * zero;         // [m] zeros
    float * x;              // [m][n_embd] residual stream between segments
    float * attn;           // [m][H][d] attention output of the previous layer
    float * q;              // [m][H][d] before RoPE
    float * q_near;         // [m][H][d] RoPE at the true position
    float * q_far;          // [m][H][d] RoPE at the fixed distance
    float * k;              // [m][G][d] before RoPE
    float * k_near;         // [m][G][d]
    float * k_far;          // [m][G][d] RoPE at 0: the key itself but for YaRN's magnitude
    float * v;              // [m][G][d]
};

// Where a backend has the window's tensors: the CPU's place is theirs, a device has a mirror of all of them.
struct io_place {
    ggml_backend_dev_t device; // NULL: the CPU
    ggml_backend_buffer_t buffer;
    char * base; // of the first tensor there
};

// Bytes of the window's tensors, counted from the first.
struct io_range {
    uint64_t offset, bytes;
};

// What one backend computes without a break. On a device, `to` is copied to its mirror before and `from` back after it;
// what the device left in its mirror before is not copied again.
struct graph_part {
    int place; // its number
    ggml_cgraph * graph;
    std::vector<io_range> to, from;
};

// One part where all weights are on the CPU, or all on one device; else one for every stretch of them.
struct segment {
    std::vector<graph_part> parts;
    ggml_tensor * logits; // [n_vocab, n_out] in the last segment, else NULL
};

// Builds segment il of a window of m tokens into ctx. Tensors of `io`, the first of which lies at places[0].base, are bound
// to the places; the rest is unallocated. Segments run in order.
segment build_segment(ggml_context * ctx, const hparams & hp, const weights & w, const window_tensors & io,
                      const std::vector<io_place> & places, int il, int m, int n_out);

// Upper bounds for the context that build_segment fills.
constexpr int N_TENSORS_PER_SEGMENT = 96, N_PARTS_PER_SEGMENT = 2;

} // namespace actqkv
