#include "weights.h"

#include "../error.h"
#include "tensor_map.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <set>

namespace actqkv {
namespace {

// The device that computes with a tensor where it lies; NULL: the CPU, also with host memory that belongs to a GPU, and
// with its own extra buffer types.
ggml_backend_dev_t device_of(const ggml_tensor * tensor) {
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(tensor->buffer);
    ggml_backend_dev_t device = ggml_backend_buft_is_host(type) ? nullptr : ggml_backend_buft_get_device(type);
    const bool cpu = device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    return cpu ? nullptr : device;
}

const char * name_of(ggml_backend_dev_t device) {
    return device != nullptr ? ggml_backend_dev_name(device) : "the CPU";
}

// The device of all of them; NULL pointers are passed over.
ggml_backend_dev_t common_device(std::initializer_list<ggml_tensor *> tensors) {
    ggml_tensor * first = nullptr;
    for (ggml_tensor * tensor : tensors) {
        first = first != nullptr ? first : tensor;
        if (tensor != nullptr && device_of(tensor) != device_of(first)) {
            throw error(ACTQKV_ERR_MODEL, format("tensor '%s' is on %s, '%s' of the same layer on %s", first->name,
                                                 name_of(device_of(first)), tensor->name, name_of(device_of(tensor))));
        }
    }
    return device_of(first);
}

class tensor_source {
public:
    explicit tensor_source(const llama_model * model) {
        for (const auto & [name, tensor] : llama_internal_get_tensor_map(model)) {
            named[name].push_back(tensor);
        }
    }

    // `last`: a tied output is listed again under the embedding's name, in the buffer meant for matrix products.
    ggml_tensor * take(const std::string & name, std::initializer_list<int64_t> shape, bool required = true,
                       bool last = false) {
        const auto found = named.find(name);
        if (found == named.end()) {
            if (required) {
                throw error(ACTQKV_ERR_MODEL, format("tensor '%s' is missing", name.c_str()));
            }
            return nullptr;
        }
        ggml_tensor * tensor = last ? found->second.back() : found->second.front();
        check_shape(tensor, name, shape);
        if (tensor->buffer == nullptr) {
            throw error(ACTQKV_ERR_MODEL, format("tensor '%s' is not loaded", name.c_str()));
        }
        used.insert(name);
        return tensor;
    }

    // Of the copies that libllama makes for each device of a tensor that all layers share; NULL where there is none.
    ggml_tensor * shared_on(ggml_backend_dev_t device, const std::string & name, std::initializer_list<int64_t> shape) {
        ggml_tensor * any = optional(name, shape);
        if (any == nullptr) {
            return nullptr;
        }
        for (ggml_tensor * tensor : named[name]) {
            if (device_of(tensor) == device) {
                return tensor;
            }
        }
        return any;
    }

    ggml_tensor * optional(const std::string & name, std::initializer_list<int64_t> shape) {
        return take(name, shape, false);
    }

    void check_all_used() const {
        for (const auto & [name, tensors] : named) {
            if (used.count(name) == 0) {
                throw error(ACTQKV_ERR_MODEL, format("tensor '%s' has no place in our graph", name.c_str()));
            }
        }
    }

private:
    static void check_shape(const ggml_tensor * tensor, const std::string & name,
                            std::initializer_list<int64_t> shape) {
        int i = 0;
        for (const int64_t ne : shape) {
            if (tensor->ne[i] != ne) {
                throw error(ACTQKV_ERR_MODEL, format("tensor '%s' has %lld at dimension %d, expected %lld",
                                                     name.c_str(), (long long) tensor->ne[i], i, (long long) ne));
            }
            i++;
        }
    }

    std::map<std::string, std::vector<ggml_tensor *>> named;
    std::set<std::string> used;
};

layer_weights read_layer(tensor_source & source, const hparams & hp, int il) {
    const int64_t E = hp.n_channels(), K = hp.n_kv_channels(), n_embd = hp.n_embd;
    const std::string p = "blk." + std::to_string(il) + ".";
    layer_weights w = {};
    w.attn_norm = source.take(p + "attn_norm.weight", {n_embd});
    w.wq = source.take(p + "attn_q.weight", {n_embd, E});
    w.wk = source.take(p + "attn_k.weight", {n_embd, K});
    w.wv = source.take(p + "attn_v.weight", {n_embd, K});
    w.bq = source.optional(p + "attn_q.bias", {E});
    w.bk = source.optional(p + "attn_k.bias", {K});
    w.bv = source.optional(p + "attn_v.bias", {K});
    if (hp.arch == "qwen3") {
        w.q_norm = source.take(p + "attn_q_norm.weight", {hp.d_head});
        w.k_norm = source.take(p + "attn_k_norm.weight", {hp.d_head});
    }
    w.wo = source.take(p + "attn_output.weight", {E, n_embd});
    w.bo = source.optional(p + "attn_output.bias", {n_embd});
    w.ffn_norm = source.take(p + "ffn_norm.weight", {n_embd});
    w.up = source.take(p + "ffn_up.weight", {n_embd});
    const int64_t n_ff = w.up->ne[1];
    w.gate = source.take(p + "ffn_gate.weight", {n_embd, n_ff});
    w.down = source.take(p + "ffn_down.weight", {n_ff, n_embd});
    w.up_b = source.optional(p + "ffn_up.bias", {n_ff});
    w.gate_b = source.optional(p + "ffn_gate.bias", {n_ff});
    w.down_b = source.optional(p + "ffn_down.bias", {n_embd});
    w.device = common_device({w.attn_norm, w.wq, w.wk, w.wv, w.bq, w.bk, w.bv, w.q_norm, w.k_norm, w.wo, w.bo,
                              w.ffn_norm, w.up, w.gate, w.down, w.up_b, w.gate_b, w.down_b});
    if (hp.arch == "llama") {
        w.rope_freqs = source.shared_on(w.device, "rope_freqs.weight", {hp.rope.n_dims / 2});
        common_device({w.attn_norm, w.rope_freqs});
    }
    return w;
}

} // namespace

bool weights::on_device() const {
    const auto there = [](const layer_weights & l) { return l.device != nullptr; };
    return embd_device != nullptr || output_device != nullptr || std::any_of(layers.begin(), layers.end(), there);
}

weights read_weights(const llama_model * model, const hparams & hp) {
    tensor_source source(model);
    weights w = {};
    w.token_embd = source.take("token_embd.weight", {hp.n_embd, hp.n_vocab});
    w.output_norm = source.take("output_norm.weight", {hp.n_embd});
    w.output = source.optional("output.weight", {hp.n_embd, hp.n_vocab});
    if (w.output == nullptr) {
        w.output = source.take("token_embd.weight", {hp.n_embd, hp.n_vocab}, true, true);
    }
    w.output_b = source.optional("output.bias", {hp.n_vocab});
    w.embd_device = device_of(w.token_embd);
    w.output_device = common_device({w.output_norm, w.output, w.output_b});
    for (int il = 0; il < hp.n_layer; il++) {
        w.layers.push_back(read_layer(source, hp, il));
    }
    source.check_all_used();
    return w;
}

} // namespace actqkv
