#include "serial.h"

#include "ggml-backend.h"

#include "../error.h"

#include "ggml.h"

namespace actqkv {

uint64_t model_fingerprint(const hparams & hp, const weights & w) {
    uint64_t hash = checksum(hp.arch.data(), hp.arch.size());
    for (const int64_t n : {hp.n_layer, hp.n_embd, hp.n_head, hp.n_head_kv, hp.d_head, hp.n_vocab, hp.n_ctx_train}) {
        hash = mix(hash, (uint64_t) n);
    }
    std::vector<uint8_t> bytes;
    const auto add = [&](const ggml_tensor * t) { // wherever it lies
        bytes.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
        hash = mix(hash, checksum(bytes.data(), bytes.size()));
    };
    add(w.output_norm);
    for (const layer_weights & l : w.layers) {
        add(l.attn_norm);
        add(l.ffn_norm);
    }
    return hash;
}

void write_memory(writer & out, const std::vector<layer_memory> & memory) {
    for (const layer_memory & l : memory) {
        out.array(l.mean);
        out.array(l.var);
        out.value(l.n_tokens);
        out.value(l.n_windows);
        out.array(l.entropies);
        out.array(l.question);
        out.array(l.asked_queries);
        out.array(l.asked_attention);
    }
}

std::vector<layer_memory> read_memory(reader & in, const hparams & hp) {
    std::vector<layer_memory> memory(hp.n_layer);
    const uint64_t E = hp.n_channels();
    for (layer_memory & l : memory) {
        in.array(l.mean, E, true);
        in.array(l.var, E, true);
        l.n_tokens = in.value<double>();
        l.n_windows = in.value<int64_t>();
        in.array_up_to(l.entropies, N_ENTROPIES);
        in.array(l.question, E, true);
        in.array_up_to(l.asked_queries, N_QUESTION_QUERIES * E);
        in.array(l.asked_attention, l.asked_queries.size() / E);
    }
    return memory;
}

void write_recent(writer & out, const recent_state & recent) {
    out.array(recent.kv);
    out.array(recent.sums);
}

void write_recent(writer & out, const kv_store & store, int64_t n_tokens) {
    if (out.to != nullptr) {
        write_recent(out, store.save_recent(n_tokens));
        return;
    }
    out.count<actqkv_f16>(store.recent_kv(n_tokens, store.n_closed()));
    out.count<float>(store.recent_sums(n_tokens, store.n_closed()));
}

recent_state read_recent(reader & in, const kv_store & store, int64_t n_tokens, int64_t n_closed) {
    const kv_layout & shape = store.layout();
    const bool known = n_closed >= 0 && n_closed <= shape.n_chunks_max(n_tokens);
    if (!known || shape.n_open_blocks(n_tokens, n_closed) > shape.n_recent_blocks) {
        throw error(ACTQKV_ERR_STATE, format("state is inconsistent: %lld chunks of %lld tokens are closed",
                                             (long long) n_closed, (long long) n_tokens));
    }
    recent_state recent;
    in.array(recent.kv, store.recent_kv(n_tokens, n_closed));
    in.array(recent.sums, store.recent_sums(n_tokens, n_closed));
    return recent;
}

void check_history(const history & read, const hparams & hp, const char * what) {
    for (int64_t i = 0; i < read.size(); i++) {
        if (read.tokens[i] < 0 || read.tokens[i] >= hp.n_vocab || read.phases[i] < 0 ||
            read.phases[i] > ACTQKV_QUESTION) {
            throw error(ACTQKV_ERR_STATE, format("%s is inconsistent at token %lld", what, (long long) i));
        }
    }
}

} // namespace actqkv
