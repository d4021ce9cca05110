// Attention of a session on a GPU, while the store stays on the CPU: a call's queries go there and its result comes back;
// open blocks are copied when they have changed, closed chunks when they are planned and not hot.
#pragma once

#include "../kv/gpu_chunks.h"
#include "../kv/gpu_ring.h"
#include "../kv/pinned_chunks.h"
#include "../kv/store.h"

#include <memory>

namespace actqkv {

class gpu_attention {
public:
    // What attention with plans of up to n_most chunks takes of a GPU's memory. With less than least_bytes it is refused,
    // more than useful_bytes has no use.
    static actqkv_gpu_memory memory_plan(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params,
                                         int32_t n_most);

    // Chunks share what the rest of the plan leaves of limit_bytes. Throws ACTQKV_ERR_MEMORY where that is less than n_most
    // chunks in every layer, or where the device has less than the limit.
    gpu_attention(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes, const hparams & hp,
                  const actqkv_params & params, const kv_store & store, int32_t n_most);
    ~gpu_attention();
    gpu_attention(const gpu_attention &) = delete;
    gpu_attention & operator=(const gpu_attention &) = delete;

    // Whether it can do what actqkv_attend would do for these arguments: one list of spans, no wider than planned for.
    bool fits(const actqkv_attend_args & args, int32_t n_chunks) const;
    // The same result as actqkv_attend's but for rounding. Span first_chunk + i is all of chunk chunks[i]; the others are
    // of the ring. ACTQKV_ERR_COMPUTE where the GPU fails: args.out is then as it was.
    void attend(int il, const actqkv_attend_args & args, const int32_t * chunks, int32_t n_chunks, int32_t first_chunk);
    // The store's tokens [first, last) of a layer were written.
    void changed(int il, int64_t first, int64_t last) { ring->changed(il, first, last); }
    // Chunks up to n_closed are closed: their memory is pinned.
    void closed(int64_t n_closed) { pinned->reach(n_closed); }
    // Before other memory is mapped in the place of chunks.
    void unpin() { pinned->leave(); }
    // After a rewind, and after another state was set (0).
    void forget_from(int64_t n_closed);

    actqkv_gpu_stats stats() const;
    void reset_stats();
    // What went otherwise than it should, and costs time only; empty: nothing.
    const std::string & problem() const { return pinned->problem(); }
    int32_t most_chunks() const { return n_most; }

private:
    // A window's arrays on the GPU, one behind the other.
    struct shape {
        int32_t n_head, n_head_kv, d_head, n_window;
        int64_t n_keys, n_spans; // of the widest call
        int64_t n_summed;        // floats of weight sums
    };
    static shape widest_of(const hparams & hp, const actqkv_params & params, int32_t n_most);
    static uint64_t sent_bytes(const shape & w);
    static uint64_t work_bytes(const actqkv_cuda & cuda, const shape & w);
    void take_memory(int32_t device, uint64_t limit_bytes, const hparams & hp, const actqkv_params & params);
    uint64_t place(uint64_t bytes);
    template <typename T> T * send(const T * from, uint64_t bytes);
    void make_spans(int il, const actqkv_attend_args & args, const std::vector<int32_t> & slots, int32_t first_chunk);
    void check(int32_t status) const;

    const actqkv_cuda & cuda;
    const kv_store & store;
    shape widest;
    int32_t n_most;
    actqkv_cuda_stream * compute = nullptr;
    uint8_t * work = nullptr; // on the GPU: a window's arrays
    uint8_t * ring_memory = nullptr;
    uint8_t * staged = nullptr; // of the host, pinned where that is possible: what is sent, then what comes back
    std::vector<uint8_t> ordinary;
    uint64_t used = 0; // of work, by the call
    uint64_t memory_bytes = 0;
    std::unique_ptr<gpu_ring> ring;
    std::unique_ptr<gpu_chunks> chunks;
    std::unique_ptr<hot_chunks> hot;
    std::unique_ptr<pinned_chunks> pinned;
    std::vector<std::vector<int32_t>> last_plans; // per layer: the guess at its next
    std::vector<actqkv_span> spans;
    actqkv_gpu_stats counts = {}; // but for what hot and pinned count
};

} // namespace actqkv
