// Attention of a session on a GPU, while weights and store stay on the CPU: a call's queries and open blocks go there and
// its result comes back; closed chunks are copied when they are planned and not hot.
#pragma once

#include "../kv/gpu_chunks.h"
#include "../kv/store.h"

#include <memory>

namespace actqkv {

class gpu_attention {
public:
    // Chunks share what the working memory of a window leaves of limit_bytes. Throws ACTQKV_ERR_MEMORY where that is less
    // than n_most chunks in every layer, or where the device has less than the limit.
    gpu_attention(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes, const hparams & hp,
                  const actqkv_params & params, const kv_store & store, int32_t n_most);
    ~gpu_attention();
    gpu_attention(const gpu_attention &) = delete;
    gpu_attention & operator=(const gpu_attention &) = delete;

    // Whether it can do what actqkv_attend would do for these arguments: one list of spans, no wider than planned for.
    bool fits(const actqkv_attend_args & args, int32_t n_chunks) const;
    // The same result as actqkv_attend's but for rounding. Span first_chunk + i is all of chunk chunks[i].
    void attend(int il, const actqkv_attend_args & args, const int32_t * chunks, int32_t n_chunks, int32_t first_chunk);
    // After a rewind, and after another state was set (0).
    void forget_from(int64_t n_closed);

    const hot_stats & stats() const { return hot->stats(); }
    int32_t n_slots() const { return hot->n_slots(); }
    uint64_t n_calls() const { return calls; }

private:
    // A window's arrays on the GPU, one behind the other.
    struct shape {
        int32_t n_head, n_head_kv, d_head, n_window;
        int64_t n_keys, n_spans, n_open; // of the widest call; tokens of its spans that are no chunks
        int64_t n_summed;                // floats of weight sums
    };
    uint64_t work_bytes() const;
    uint8_t * place(uint64_t bytes);
    template <typename T> T * send(const T * from, uint64_t bytes);
    void check(int32_t status) const;

    const actqkv_cuda & cuda;
    shape widest;
    int32_t n_most;
    actqkv_cuda_stream * compute = nullptr;
    uint8_t * work = nullptr;
    uint64_t used = 0; // of work, by the call
    std::unique_ptr<gpu_chunks> chunks;
    std::unique_ptr<hot_chunks> hot;
    std::vector<std::vector<int32_t>> last_plans; // per layer: the guess at its next
    std::vector<actqkv_span> spans;
    uint64_t calls = 0;
};

} // namespace actqkv
