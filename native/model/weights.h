// The loaded tensors of a model, by role, with their shapes checked. Views: the llama_model owns them.
#pragma once

#include "hparams.h"

#include <vector>

struct ggml_tensor;
struct ggml_backend_device;

namespace actqkv {

// Shapes in ggml order, ne[0] first. E = n_head * d_head, K = n_head_kv * d_head. NULL where a model has none.
struct layer_weights {
    ggml_tensor * attn_norm;       // [n_embd]
    ggml_tensor *wq, *wk, *wv;     // [n_embd, E], [n_embd, K], [n_embd, K]
    ggml_tensor *bq, *bk, *bv;     // [E], [K], [K]; qwen2, some llama
    ggml_tensor *q_norm, *k_norm;  // [d_head]; qwen3
    ggml_tensor *wo, *bo;          // [E, n_embd], [n_embd]
    ggml_tensor * ffn_norm;        // [n_embd]
    ggml_tensor *gate, *up, *down; // [n_embd, n_ff], [n_embd, n_ff], [n_ff, n_embd]
    ggml_tensor *gate_b, *up_b, *down_b;
    ggml_tensor * rope_freqs;     // [d_head / 2]; llama3 scaling: of all layers the same
    ggml_backend_device * device; // whose memory all of them lie in; NULL: memory that the CPU computes in
};

struct weights {
    ggml_tensor * token_embd;                         // [n_embd, n_vocab]
    ggml_tensor * output_norm;                        // [n_embd]
    ggml_tensor * output;                             // [n_embd, n_vocab]; token_embd again when tied
    ggml_tensor * output_b;                           // [n_vocab]; some qwen2
    ggml_backend_device *embd_device, *output_device; // of token_embd; of the three of the output
    std::vector<layer_weights> layers;

    // Whether any of them lies on a GPU.
    bool on_device() const;
};

// Throws ACTQKV_ERR_MODEL when a tensor is missing, has another shape, is on another device than its layer, or would stay
// unused.
weights read_weights(const llama_model * model, const hparams & hp);

} // namespace actqkv
