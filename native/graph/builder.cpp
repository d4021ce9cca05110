#include "builder.h"

namespace actqkv {
namespace {

struct builder {
    ggml_context * ctx;
    const hparams & hp;
    const weights & w;
    const window_tensors & io;
    ggml_backend_buffer_t io_buffer;
    ggml_cgraph * graph;
    int m;

    ggml_tensor * bind(ggml_tensor * tensor, void * data) const {
        ggml_backend_tensor_alloc(io_buffer, tensor, data);
        return tensor;
    }

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1, void * data) const {
        return bind(ggml_new_tensor_2d(ctx, type, ne0, ne1), data);
    }

    // The result of an operation is written straight to `data`, where the outside reads it.
    ggml_tensor * output(ggml_tensor * tensor, void * data) const {
        ggml_tensor * owner = tensor->view_src != nullptr ? tensor->view_src : tensor;
        bind(owner, data);
        ggml_build_forward_expand(graph, tensor);
        return tensor;
    }

    ggml_tensor * norm(ggml_tensor * x, ggml_tensor * weight) const {
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, hp.rms_eps), weight);
    }

    ggml_tensor * linear(ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x) const {
        ggml_tensor * y = ggml_mul_mat(ctx, weight, x);
        return bias != nullptr ? ggml_add(ctx, y, bias) : y;
    }

    ggml_tensor * rope(ggml_tensor * x, ggml_tensor * position) const {
        const rope_params & r = hp.rope;
        return ggml_rope_ext(ctx, x, position, w.rope_freqs, r.n_dims, r.type, r.n_ctx_orig, r.freq_base, r.freq_scale,
                             r.ext_factor, r.attn_factor, r.beta_fast, r.beta_slow);
    }

    ggml_tensor * positions(int32_t * data) const { return bind(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, m), data); }

    ggml_tensor * heads(ggml_tensor * x, int n) const { return ggml_reshape_3d(ctx, x, hp.d_head, n, m); }

    void qkv(const layer_weights & l, ggml_tensor * x) const {
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
        ggml_tensor * position = positions(io.position);
        ggml_tensor * far_position = positions(io.far_position);
        ggml_tensor * zero = positions(io.zero);
        output(rope(q, position), io.q_near);
        output(rope(q, far_position), io.q_far);
        output(rope(k, position), io.k_near);
        output(rope(k, zero), io.k_far);
    }

    // Rest of a layer after attention, for the last n tokens of the window. Returns the new residual stream.
    ggml_tensor * finish_layer(const layer_weights & l, int n) const {
        const int64_t E = hp.n_channels();
        float * attn = io.attn + (m - n) * E;
        float * x = io.x + (int64_t) (m - n) * hp.n_embd;
        ggml_tensor * inp = input(GGML_TYPE_F32, hp.n_embd, n, x);
        ggml_tensor * cur = linear(l.wo, l.bo, input(GGML_TYPE_F32, E, n, attn));
        ggml_tensor * inner = ggml_add(ctx, cur, inp);
        cur = norm(inner, l.ffn_norm);
        ggml_tensor * up = linear(l.up, l.up_b, cur);
        ggml_tensor * gate = linear(l.gate, l.gate_b, cur);
        cur = linear(l.down, l.down_b, ggml_swiglu_split(ctx, gate, up));
        return ggml_add(ctx, cur, inner);
    }
};

} // namespace

segment build_segment(ggml_context * ctx, const hparams & hp, const weights & w, const window_tensors & io,
                      ggml_backend_buffer_t io_buffer, int il, int m, int n_out) {
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, N_TENSORS_PER_SEGMENT, false);
    const builder b = {ctx, hp, w, io, io_buffer, graph, m};
    if (il == 0) {
        ggml_tensor * tokens = b.bind(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, m), io.token);
        b.qkv(w.layers[0], b.output(ggml_get_rows(ctx, w.token_embd, tokens), io.x));
        return {graph, nullptr};
    }
    if (il < hp.n_layer) {
        b.qkv(w.layers[il], b.output(b.finish_layer(w.layers[il - 1], m), io.x));
        return {graph, nullptr};
    }
    ggml_tensor * x = b.finish_layer(w.layers[hp.n_layer - 1], n_out);
    ggml_tensor * logits = b.linear(w.output, w.output_b, b.norm(x, w.output_norm));
    ggml_set_output(logits);
    ggml_build_forward_expand(graph, logits);
    return {graph, logits};
}

} // namespace actqkv
