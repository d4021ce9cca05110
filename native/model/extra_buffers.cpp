#include "extra_buffers.h"

#include "../error.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <cmath>
#include <vector>

namespace actqkv {
namespace {

constexpr int64_t N = 256; // rows and columns of the weight: one block of every K-quant, whole AMX tiles

// Weight [N, N] of `type` times activations [N, m]. tensors carry no data yet.
struct product {
    ggml_context_ptr ctx;
    ggml_tensor * weight;
    ggml_tensor * input;
    ggml_tensor * output;

    product(ggml_type type, int m)
        : ctx(ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true})),
          weight(ggml_new_tensor_2d(ctx.get(), type, N, N)), input(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, N, m)),
          output(ggml_mul_mat(ctx.get(), weight, input)) {}
};

// As libllama asks before it puts a tensor into a buffer type.
bool supports(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft, ggml_type type) {
    const product p(type, 64);
    ggml_backend_buffer_ptr dummy(ggml_backend_buft_alloc_buffer(buft, 0));
    p.weight->buffer = dummy.get();
    const bool result = ggml_backend_dev_supports_op(device, p.output);
    p.weight->buffer = nullptr;
    return result;
}

std::vector<float> multiply(ggml_backend_t backend, ggml_backend_buffer_type_t buft, ggml_type type, int m) {
    product p(type, m);
    ggml_backend_buffer_ptr weights(
        ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, p.weight)));
    ggml_backend_buffer_set_usage(weights.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_alloc(weights.get(), p.weight, ggml_backend_buffer_get_base(weights.get()));

    std::vector<float> values(N * std::max<int64_t>(N, m));
    for (size_t i = 0; i < values.size(); i++) {
        values[i] = std::sin(0.37f * (float) i) + 0.25f * std::cos(1.7f * (float) i);
    }
    std::vector<uint8_t> quantised(ggml_nbytes(p.weight));
    ggml_quantize_chunk(type, values.data(), quantised.data(), 0, N, N, nullptr);
    ggml_backend_tensor_set(p.weight, quantised.data(), 0, quantised.size());

    ggml_cgraph * graph = ggml_new_graph(p.ctx.get());
    ggml_build_forward_expand(graph, p.output);
    ggml_gallocr_ptr allocator(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    ggml_set_input(p.input);
    ggml_set_output(p.output);
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
        throw error(ACTQKV_ERR_MEMORY, "cannot allocate a small graph");
    }
    ggml_backend_tensor_set(p.input, values.data(), 0, ggml_nbytes(p.input));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw error(ACTQKV_ERR_COMPUTE, format("a product in %s buffers failed", ggml_backend_buft_name(buft)));
    }
    std::vector<float> result(ggml_nelements(p.output));
    ggml_backend_tensor_get(p.output, result.data(), 0, ggml_nbytes(p.output));
    return result;
}

// Activations are quantised to 8 bits differently from buffer type to buffer type; a broken kernel is off by far more.
constexpr double MAX_NMSE = 1e-3;

void compare(ggml_backend_t backend, ggml_backend_buffer_type_t extra, ggml_type type, int m) {
    const std::vector<float> expected = multiply(backend, ggml_backend_cpu_buffer_type(), type, m);
    const std::vector<float> actual = multiply(backend, extra, type, m);
    double diff = 0.0, norm = 0.0;
    for (size_t i = 0; i < expected.size(); i++) {
        diff += std::pow(expected[i] - actual[i], 2);
        norm += std::pow(expected[i], 2);
    }
    if (!(diff <= MAX_NMSE * norm)) {
        throw error(ACTQKV_ERR_COMPUTE,
                    format("%s buffers compute %s products wrongly: NMSE %g, expected at most %g",
                           ggml_backend_buft_name(extra), ggml_type_name(type), diff / norm, MAX_NMSE));
    }
}

} // namespace

void try_extra_buffers() {
    ggml_backend_ptr backend(ggml_backend_cpu_init());
    ggml_backend_dev_t device = ggml_backend_get_device(backend.get());
    const auto list = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    ggml_backend_cpu_set_n_threads(backend.get(), 2);
    for (ggml_backend_buffer_type_t * buft = list ? list(device) : nullptr; buft != nullptr && *buft; buft++) {
        for (const ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                     GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS, GGML_TYPE_IQ4_NL}) {
            if (supports(device, *buft, type)) {
                compare(backend.get(), *buft, type, 1);
                compare(backend.get(), *buft, type, 64);
            }
        }
    }
}

} // namespace actqkv
