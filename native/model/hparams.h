// The numbers of a model, from the public metadata getters of libllama, as libllama itself resolves them.
#pragma once

#include <cstdint>
#include <string>

struct llama_model;

namespace actqkv {

struct rope_params {
    int type;       // GGML_ROPE_TYPE_NORMAL or GGML_ROPE_TYPE_NEOX
    int n_dims;     // rotated dimensions of a head
    int n_ctx_orig; // trained length before scaling (YaRN)
    float freq_base;
    float freq_scale;  // 1 / scaling factor
    float ext_factor;  // 1 for YaRN, else 0
    float attn_factor; // magnitude, see yarn_attn_factor in hparams.cpp
    float beta_fast;
    float beta_slow;
};

struct hparams {
    std::string arch; // "llama", "qwen2", "qwen3"
    int32_t n_layer;
    int32_t n_embd;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t d_head;
    int32_t n_vocab;
    int32_t n_ctx_train;
    float rms_eps;
    float attn_scale; // of q . k
    rope_params rope;

    int64_t n_channels() const { return (int64_t) n_head * d_head; } // E
    int64_t n_kv_channels() const { return (int64_t) n_head_kv * d_head; }
};

// Throws ACTQKV_ERR_MODEL for what our graph does not compute.
hparams read_hparams(const llama_model * model);

} // namespace actqkv
