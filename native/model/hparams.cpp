#include "hparams.h"

#include "../error.h"

#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

namespace actqkv {
namespace {

void require(bool holds, const char * what) {
    if (!holds) {
        throw error(ACTQKV_ERR_MODEL, what);
    }
}

struct metadata {
    const llama_model * model;
    std::string prefix; // "llama."

    bool has(const std::string & key) const { return llama_model_meta_val_str(model, key.c_str(), nullptr, 0) >= 0; }

    std::string text(const std::string & key, const std::string & fallback) const {
        std::array<char, 512> buffer;
        const int n = llama_model_meta_val_str(model, key.c_str(), buffer.data(), buffer.size());
        return n < 0 ? fallback : std::string(buffer.data());
    }

    double number(const std::string & name, double fallback) const {
        const std::string value = text(prefix + name, "");
        if (value.empty()) {
            return fallback;
        }
        char * end = nullptr;
        const double parsed = strtod(value.c_str(), &end);
        if (*end != '\0' || !std::isfinite(parsed)) {
            throw error(ACTQKV_ERR_MODEL, format("metadata %s%s is '%s', expected one number for all layers",
                                                 prefix.c_str(), name.c_str(), value.c_str()));
        }
        return parsed;
    }

    int32_t count(const std::string & name, int32_t fallback) const {
        const double parsed = number(name, fallback);
        if (!(parsed >= 0.0 && parsed <= INT32_MAX)) {
            throw error(ACTQKV_ERR_MODEL, format("metadata %s%s is %g, expected 0 to %d", prefix.c_str(), name.c_str(),
                                                 parsed, INT32_MAX));
        }
        return (int32_t) parsed;
    }
};

// libllama's llama_context constructor: YaRN's magnitude, with the factor that ggml_rope applies itself cancelled.
float yarn_attn_factor(const metadata & meta, const rope_params & rope) {
    float attn = 1.0f;
    if (rope.ext_factor != 0.0f) {
        const float magnitude = 1.0f + 0.1f * logf(1.0f / rope.freq_scale);
        attn = std::max(1.0f, magnitude) / magnitude;
    }
    return attn * (float) meta.number("rope.scaling.attn_factor", 1.0);
}

rope_params read_rope(const metadata & meta, const hparams & hp) {
    rope_params rope = {};
    switch (llama_model_rope_type(meta.model)) {
    case LLAMA_ROPE_TYPE_NORM:
        rope.type = GGML_ROPE_TYPE_NORMAL;
        break;
    case LLAMA_ROPE_TYPE_NEOX:
        rope.type = GGML_ROPE_TYPE_NEOX;
        break;
    default:
        throw error(ACTQKV_ERR_MODEL, "rope type is neither normal nor neox");
    }
    rope.n_dims = meta.count("rope.dimension_count", hp.d_head);
    if (rope.n_dims == 0 || rope.n_dims % 2 != 0 || rope.n_dims > hp.d_head) { // ggml aborts, or does not end
        throw error(ACTQKV_ERR_MODEL,
                    format("rope.dimension_count is %d, expected an even number from 2 to %d", rope.n_dims, hp.d_head));
    }
    rope.freq_base = (float) meta.number("rope.freq_base", 10000.0);
    require(rope.freq_base > 0.0f && std::isfinite(rope.freq_base), "rope.freq_base is not a positive number");
    const std::string type = meta.text(meta.prefix + "rope.scaling.type", "linear");
    if (type != "none" && type != "linear" && type != "yarn") {
        throw error(ACTQKV_ERR_MODEL, format("rope scaling '%s' is not one of none, linear, yarn", type.c_str()));
    }
    const double factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0.0));
    require(factor >= 0.0, "rope.scaling.factor is negative");
    rope.freq_scale = factor == 0.0 || type == "none" ? 1.0f : 1.0f / (float) factor;
    rope.n_ctx_orig = meta.count("rope.scaling.original_context_length", 0);
    if (rope.n_ctx_orig == 0) {
        rope.n_ctx_orig = hp.n_ctx_train;
    }
    // libllama reads yarn_ext_factor, yarn_attn_factor, yarn_beta_* and yarn_log_multiplier for other architectures.
    rope.ext_factor = type == "yarn" ? 1.0f : 0.0f;
    rope.beta_fast = 32.0f;
    rope.beta_slow = 1.0f;
    rope.attn_factor = yarn_attn_factor(meta, rope);
    return rope;
}

} // namespace

hparams read_hparams(const llama_model * model) {
    metadata meta = {model, ""};
    hparams hp = {};
    hp.arch = meta.text("general.architecture", "");
    if (hp.arch != "llama" && hp.arch != "qwen2" && hp.arch != "qwen3") {
        throw error(ACTQKV_ERR_MODEL, format("architecture '%s' is not one of llama, qwen2, qwen3", hp.arch.c_str()));
    }
    meta.prefix = hp.arch + ".";
    hp.n_layer = llama_model_n_layer(model);
    hp.n_embd = llama_model_n_embd(model);
    hp.n_head = llama_model_n_head(model);
    hp.n_head_kv = llama_model_n_head_kv(model);
    hp.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    hp.n_ctx_train = llama_model_n_ctx_train(model);

    require(hp.n_layer > 0 && hp.n_embd > 0 && hp.n_vocab > 0, "the model holds no layers (a vocabulary-only file?)");
    require(hp.n_head > 0 && hp.n_head_kv > 0 && hp.n_head % hp.n_head_kv == 0,
            "the number of query heads is not a multiple of the number of KV heads");
    require(meta.number("expert_count", 0) == 0, "mixture of experts");
    require(llama_model_n_swa(model) == 0, "sliding-window attention");
    require(meta.text(meta.prefix + "attention.causal", "true") == "true", "attention that is not causal");

    meta.number("attention.head_count", 0); // one number for all layers, not a list
    meta.number("attention.head_count_kv", 0);
    hp.d_head = meta.count("attention.key_length", hp.n_embd / hp.n_head);
    require(meta.number("attention.value_length", hp.d_head) == hp.d_head, "key and value heads differ in size");
    require(hp.d_head > 0 && hp.d_head % 2 == 0, "the head size is odd");
    hp.rms_eps = (float) meta.number("attention.layer_norm_rms_epsilon", 0.0);
    // libllama tells six decimals. With 0 instead of what is less, a token whose embedding is all zeros would be NaN.
    require(hp.rms_eps > 0.0f && std::isfinite(hp.rms_eps), "the epsilon of its norms is below 0.000001 or not finite");
    hp.rope = read_rope(meta, hp);
    hp.attn_scale = 1.0f / sqrtf((float) hp.d_head);
    return hp;
}

} // namespace actqkv
