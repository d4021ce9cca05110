#include "builder.h"

#include <algorithm>

namespace actqkv {
namespace {

struct builder {
    ggml_context * ctx;
    const hparams & hp;
    const weights & w;
    const window_tensors & io;
    const std::vector<io_place> & places;
    int m;
    std::vector<graph_part> parts = {};

    graph_part & part() { return parts.back(); }
    const io_place & here() { return places[part().place]; }

    uint64_t offset_of(const void * data) const { return (uint64_t) ((const char *) data - places[0].base); }

    // From now on, operations are `device`'s.
    void move_to(ggml_backend_dev_t device) {
        int place = 0;
        while (places[place].device != device) {
            place++;
        }
        if (parts.empty() || part().place != place) {
            parts.push_back({place, ggml_new_graph_custom(ctx, N_TENSORS_PER_SEGMENT, false), {}, {}});
        }
    }

    void copy_here(const void * data, uint64_t bytes) {
        if (here().device != nullptr) {
            part().to.push_back({offset_of(data), bytes});
        }
    }

    void copy_back(const void * data, uint64_t bytes) {
        if (here().device != nullptr) {
            part().from.push_back({offset_of(data), bytes});
        }
    }

    ggml_tensor * bind(ggml_tensor * tensor, void * data) {
        ggml_backend_tensor_alloc(here().buffer, tensor, here().base + offset_of(data));
        return tensor;
    }

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1, void * data) {
        return bind(ggml_new_tensor_2d(ctx, type, ne0, ne1), data);
    }

    // The result of an operation is written straight to `data`.
    ggml_tensor * keep(ggml_tensor * tensor, void * data) {
        ggml_tensor * owner = tensor->view_src != nullptr ? tensor->view_src : tensor;
        bind(owner, data);
        ggml_build_forward_expand(part().graph, tensor);
        return tensor;
    }

    // The same, and the outside reads it.
    void output(ggml_tensor * tensor, void * data) {
        keep(tensor, data);
        copy_back(data, ggml_nbytes(tensor));
    }

    // The residual stream x, of n tokens and kept in io.x, for operations of `device`.
    ggml_tensor * carry(ggml_tensor * x, int n, ggml_backend_dev_t device) {
        if (here().device == device) {
            return x;
        }
        float * data = io.x + (int64_t) (m - n) * hp.n_embd;
        copy_back(data, ggml_nbytes(x));
        move_to(device);
        copy_here(data, ggml_nbytes(x));
        return input(GGML_TYPE_F32, hp.n_embd, n, data);
    }

    ggml_tensor * norm(ggml_tensor * x, ggml_tensor * weight) const {
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, hp.rms_eps), weight);
    }

    ggml_tensor * linear(ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x) const {
        ggml_tensor * y = ggml_mul_mat(ctx, weight, x);
        return bias != nullptr ? ggml_add(ctx, y, bias) : y;
    }

    ggml_tensor * rope(const layer_weights & l, ggml_tensor * x, ggml_tensor * position) const {
        const rope_params & r = hp.rope;
        return ggml_rope_ext(ctx, x, position, l.rope_freqs, r.n_dims, r.type, r.n_ctx_orig, r.freq_base, r.freq_scale,
                             r.ext_factor, r.attn_factor, r.beta_fast, r.beta_slow);
    }

    // first: of the window's segments on this device, to which positions are copied once.
    ggml_tensor * positions(int32_t * data, bool first) {
        if (first) {
            copy_here(data, m * sizeof(int32_t));
        }
        return bind(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, m), data);
    }

    ggml_tensor * heads(ggml_tensor * x, int n) const { return ggml_reshape_3d(ctx, x, hp.d_head, n, m); }

    void qkv(int il, ggml_tensor * x) {
        const layer_weights & l = w.layers[il];
        const auto same = [&](const layer_weights & other) { return other.device == l.device; };
        const bool first = std::none_of(w.layers.begin(), w.layers.begin() + il, same);
        x = carry(x, m, l.device);
        ggml_tensor * cur = norm(x, l.attn_norm);
        ggml_tensor * q = heads(linear(l.wq, l.bq, cur), hp.n_head);
        ggml_tensor * k = heads(linear(l.wk, l.bk, cur), hp.n_head_kv);
        if (l.q_norm != nullptr) {
            q = norm(q, l.q_norm);
            k = norm(k, l.k_norm);
        }
        output(q, io.q);
        output(k, io.k);
        output(linear(l.wv, l.bv, cur), io.v);
        ggml_tensor * position = positions(io.position, first);
        ggml_tensor * far_position = positions(io.far_position, first);
        ggml_tensor * zero = positions(io.zero, first);
        output(rope(l, q, position), io.q_near);
        output(rope(l, q, far_position), io.q_far);
        output(rope(l, k, position), io.k_near);
        output(rope(l, k, zero), io.k_far);
    }

    // Rest of a layer after attention, for the last n tokens of the window: the new residual stream.
    ggml_tensor * finish_layer(const layer_weights & l, int n) {
        move_to(l.device); // which has x, from the layer's first half
        const int64_t E = hp.n_channels();
        float * attn = io.attn + (m - n) * E;
        float * x = io.x + (int64_t) (m - n) * hp.n_embd;
        copy_here(attn, n * E * sizeof(float));
        ggml_tensor * inp = input(GGML_TYPE_F32, hp.n_embd, n, x);
        ggml_tensor * cur = linear(l.wo, l.bo, input(GGML_TYPE_F32, E, n, attn));
        ggml_tensor * inner = ggml_add(ctx, cur, inp);
        cur = norm(inner, l.ffn_norm);
        ggml_tensor * up = linear(l.up, l.up_b, cur);
        ggml_tensor * gate = linear(l.gate, l.gate_b, cur);
        cur = linear(l.down, l.down_b, ggml_swiglu_split(ctx, gate, up));
        return keep(ggml_add(ctx, cur, inner), x);
    }
};

} // namespace

segment build_segment(ggml_context * ctx, const hparams & hp, const weights & w, const window_tensors & io,
                      const std::vector<io_place> & places, int il, int m, int n_out) {
    builder b = {ctx, hp, w, io, places, m};
    if (il == 0) {
        b.move_to(w.embd_device);
        b.copy_here(io.token, m * sizeof(int32_t));
        ggml_tensor * tokens = b.bind(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, m), io.token);
        b.qkv(0, b.keep(ggml_get_rows(ctx, w.token_embd, tokens), io.x));
        return {b.parts, nullptr};
    }
    if (il < hp.n_layer) {
        b.qkv(il, b.finish_layer(w.layers[il - 1], m));
        return {b.parts, nullptr};
    }
    ggml_tensor * x = b.carry(b.finish_layer(w.layers[hp.n_layer - 1], n_out), n_out, w.output_device);
    ggml_tensor * logits = b.linear(w.output, w.output_b, b.norm(x, w.output_norm));
    ggml_set_output(logits);
    ggml_build_forward_expand(b.part().graph, logits);
    return {b.parts, logits};
}

} // namespace actqkv
