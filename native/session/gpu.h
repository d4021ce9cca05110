// Attention of a session on a GPU, while the store stays on the CPU: a call's queries go there and its result comes back;
// open blocks are copied when they have changed, closed chunks when they close and there is room, or when they are planned
// and not hot. Where its memory has room for what plans are made of, answering steps are planned there too (gpu_plan.h).
//
// A call waits once. What lies in ordinary memory is therefore copied before anything else is queued: the driver may hold
// the host in such a copy until all before it on the stream has ended.
#pragma once

#include "../kv/gpu_chunks.h"
#include "../kv/gpu_ring.h"
#include "../kv/pinned_chunks.h"
#include "../kv/store.h"
#include "gpu_plan.h"

#include <memory>

namespace actqkv {

class gpu_attention {
public:
    // What attention with plans of up to n_most chunks takes of a GPU's memory. With less than least_bytes it is refused,
    // from planning_bytes on plans are made there (0: never), more than useful_bytes has no use.
    static actqkv_gpu_memory memory_plan(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params,
                                         int32_t n_most);

    // Chunks share what the rest of the plan leaves of limit_bytes. Throws ACTQKV_ERR_MEMORY where that is less than n_most
    // chunks in every layer, or where the device has less than the limit.
    gpu_attention(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes, const hparams & hp,
                  const actqkv_params & params, const kv_store & store, int32_t n_most);
    ~gpu_attention();
    gpu_attention(const gpu_attention &) = delete;
    gpu_attention & operator=(const gpu_attention &) = delete;

    // Whether it can do what actqkv_attend would do for these arguments: one list of spans, no wider than
    // planned for, and no mass of them.
    bool fits(const actqkv_attend_args & args, int32_t n_chunks) const;
    // The same result as actqkv_attend's but for rounding. Span first_chunk + i is all of chunk chunks[i]; the others are
    // of the ring. ACTQKV_ERR_COMPUTE where the GPU fails: what is in args.out is then of no use.
    void attend(int il, const actqkv_attend_args & args, const int32_t * chunks, int32_t n_chunks, int32_t first_chunk);

    // Whether answer() can be asked for so wide a choice.
    bool plans_too(const choice & c) const {
        return plans != nullptr && sees_chunks && pinned->has(c.n_chunks) && plans->has_room(c);
    }
    // Plans a step of one query and attends by that plan, with one wait. The spans from first_chunk on stand for c.k planned
    // chunks, whichever they are. q: of args' queries.
    gpu_planner::result answer(int il, const actqkv_attend_args & args, int32_t first_chunk, const choice & c,
                               float temperature, const gpu_queries & q);

    // The store's tokens [first, last) of a layer were written.
    void changed(int il, int64_t first, int64_t last) { ring->changed(il, first, last); }
    // Chunks up to n_closed are closed: their memory is pinned, and they are copied where there is room.
    void closed(int64_t n_closed);
    // Before other memory is mapped in the place of chunks.
    void unpin();
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
    static uint64_t staged_bytes_of(const shape & w);
    static uint64_t work_bytes(const actqkv_cuda & cuda, const shape & w);
    void take_memory(uint64_t plans_bytes, uint64_t chunks_limit, const hparams & hp, const actqkv_params & params);
    uint64_t place(uint64_t bytes);
    template <typename T> T * send_large(const T * from, uint64_t bytes);
    template <typename T> T * stage(const T * from, uint64_t bytes, uint64_t first);
    actqkv_attend_args send_all(const actqkv_attend_args & args);
    void make_spans(int il, const actqkv_attend_args & args, int32_t first_chunk, int32_t n_chunks);
    void put(int32_t at, const uint8_t * keys, const uint8_t * values);
    void run(const actqkv_attend_args & args, actqkv_attend_args & on_gpu, const void * report, uint64_t report_bytes);
    void see_chunks();
    void bring_stretches(int64_t n_closed);
    void check(int32_t status) const;

    const actqkv_cuda & cuda;
    const kv_store & store;
    shape widest;
    int32_t n_most;
    actqkv_cuda_stream * compute = nullptr;
    uint8_t * work = nullptr; // on the GPU: a window's arrays
    uint8_t * ring_memory = nullptr;
    uint8_t * plans_memory = nullptr;
    uint8_t * staged = nullptr; // of the host, pinned where that is possible: what is sent, then what comes back
    std::vector<uint8_t> ordinary;
    uint64_t staged_bytes = 0;
    uint64_t used = 0;    // of work, by the call
    uint64_t results = 0; // where in it what comes back begins
    uint64_t memory_bytes = 0;
    std::unique_ptr<gpu_ring> ring;
    std::unique_ptr<gpu_chunks> chunks;
    std::unique_ptr<hot_chunks> hot;
    std::unique_ptr<pinned_chunks> pinned;
    std::unique_ptr<gpu_planner> plans; // NULL: plans are made on the CPU
    int32_t device;
    int64_t n_filled = 0;                         // chunks that were given a slot when they closed, if there was any
    std::vector<uint64_t> told;                   // per layer: hot->changes() that the planner knows of
    bool looked = false, sees_chunks = false;     // kernels see pinned chunks
    std::vector<std::vector<int32_t>> last_plans; // per layer: the guess at its next
    std::vector<actqkv_span> spans;
    actqkv_gpu_stats counts = {}; // but for what hot and pinned count
};

} // namespace actqkv
