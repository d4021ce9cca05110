// The state of a session as one blob.
//
//   u64 magic "AKVSTATE"   u32 version   u32 zero
//   u64 fingerprint of the model: shape, size, and the weights of its norms
//   actqkv_params of reading, actqkv_params of answering (n_ctx and n_threads may differ when it is set)
//   i64 n_tokens   i64 n_done   i64 n_closed
//   i32 tokens[n_tokens]   i8 phases[n_tokens]
//   layer memories, recent state, checkpoints (each array preceded by its u64 count)
//   per layer: sinks, closed chunks, summaries, norms, long stretches in use
//   u64 checksum of everything before
//
// A blob is checked as a whole, and every count against what this session expects, before the session is touched:
// even a forged checksum cannot read or write out of bounds, and a refused blob changes nothing.
#include "session.h"

#include "../error.h"
#include "serial.h"

#include "llama.h"

namespace actqkv {
namespace {

constexpr uint64_t MAGIC = 0x4554415453564B41; // "AKVSTATE"
constexpr uint32_t VERSION = 5;

// Weights of another type give other results, so a state is of one file's weights.
uint64_t fingerprint(const llama_model * model, const hparams & hp, const weights & w) {
    return mix(mix(model_fingerprint(hp, w), llama_model_size(model)), llama_model_n_params(model));
}

bool same_method(actqkv_params a, const actqkv_params & b) {
    a.n_ctx = b.n_ctx;
    a.n_threads = b.n_threads;
    return memcmp(&a, &b, sizeof(a)) == 0;
}

void write_state(writer & out, uint64_t model, const hparams & hp, const actqkv_params & params,
                 const actqkv_params & answering, const history & tokens, int64_t n_done, const kv_store & store,
                 const std::vector<layer_memory> & memory, const checkpoints & saved) {
    out.value(MAGIC);
    out.value(VERSION);
    out.value((uint32_t) 0);
    out.value(model);
    out.value(params);
    out.value(answering);
    out.value(tokens.size());
    out.value(n_done);
    out.value(store.n_closed());
    out.raw(tokens.tokens.data(), tokens.size() * sizeof(int32_t));
    out.raw(tokens.phases.data(), tokens.size());
    write_memory(out, memory);
    write_recent(out, store, n_done);
    out.value((uint64_t) saved.list().size());
    for (const checkpoint & c : saved.list()) {
        out.value(c.n_past);
        out.value(c.n_closed);
        out.value((uint8_t) c.pinned);
        write_memory(out, c.memory);
        write_recent(out, c.recent);
    }
    for (int il = 0; il < hp.n_layer; il++) {
        for (const kv_store::range & r : store.used_ranges(il, n_done, store.n_closed())) {
            out.raw(r.data, r.bytes);
        }
    }
    out.value(out.to == nullptr ? (uint64_t) 0 : checksum(out.to, out.used));
}

void check_blob(const uint8_t * data, uint64_t size) {
    uint64_t magic = 0, sum = 0;
    if (size < 64 || (memcpy(&magic, data, 8), magic != MAGIC)) {
        throw error(ACTQKV_ERR_STATE, "not a state of actqkv");
    }
    uint32_t version;
    memcpy(&version, data + 8, 4);
    if (version != VERSION) {
        throw error(ACTQKV_ERR_STATE, format("state version is %u, expected %u", version, VERSION));
    }
    memcpy(&sum, data + size - 8, 8);
    if (sum != checksum(data, size - 8)) {
        throw error(ACTQKV_ERR_STATE, "state is damaged or truncated: its checksum does not match");
    }
}

} // namespace

uint64_t session::state_size() const {
    writer out = {nullptr};
    write_state(out, 0, hp, params, answering, tokens, n_done, store, memory, saved);
    return out.used;
}

void session::state_get(uint8_t * data, uint64_t size) const {
    const uint64_t needed = state_size();
    if (size < needed) {
        throw error(ACTQKV_ERR_ARGUMENT, format("the buffer has %llu bytes, expected %llu", (unsigned long long) size,
                                                (unsigned long long) needed));
    }
    store.check_between(0, store.n_closed());
    writer out = {data};
    write_state(out, fingerprint(model, hp, tensors), hp, params, answering, tokens, n_done, store, memory, saved);
    store.check_file();
}

void session::state_set(const uint8_t * data, uint64_t size) {
    check_blob(data, size);
    reader in = {data, size - 8};
    in.used = 16;
    if (in.value<uint64_t>() != fingerprint(model, hp, tensors)) {
        throw error(ACTQKV_ERR_STATE, "state is of another model");
    }
    const bool same_reading = same_method(in.value<actqkv_params>(), params);
    if (!same_method(in.value<actqkv_params>(), answering) || !same_reading) {
        throw error(ACTQKV_ERR_STATE, "state was made with other parameters (method, sizes, positions or kv_type)");
    }
    const int64_t n = in.value<int64_t>(), done = in.value<int64_t>(), closed = in.value<int64_t>();
    if (n < 0 || n > params.n_ctx) {
        throw error(ACTQKV_ERR_STATE,
                    format("state holds %lld tokens, n_ctx is %d: give room for these, and what follows", (long long) n,
                           params.n_ctx));
    }
    if (done < 0 || done > n) {
        throw error(ACTQKV_ERR_STATE, "state is inconsistent: more done than read");
    }
    history read;
    in.require(n * (sizeof(int32_t) + sizeof(int8_t)));
    read.tokens.resize(n);
    read.phases.resize(n);
    in.raw(read.tokens.data(), n * sizeof(int32_t));
    in.raw(read.phases.data(), n);
    check_history(read, hp, "state");
    std::vector<layer_memory> new_memory = read_memory(in, hp);
    const recent_state new_recent = read_recent(in, store, done, closed);
    checkpoints new_saved;
    const uint64_t n_saved = in.value<uint64_t>();
    for (uint64_t i = 0; i < n_saved; i++) {
        checkpoint c;
        c.n_past = in.value<int64_t>();
        c.n_closed = in.value<int64_t>();
        c.pinned = in.value<uint8_t>() != 0;
        if (c.n_past < 0 || c.n_past > done || c.n_closed > closed) {
            throw error(ACTQKV_ERR_STATE, "state is inconsistent: a checkpoint lies behind its end");
        }
        c.memory = read_memory(in, hp);
        c.recent = read_recent(in, store, c.n_past, c.n_closed);
        new_saved.add(std::move(c));
    }

    uint64_t rest = 0;
    for (int il = 0; il < hp.n_layer; il++) {
        for (const kv_store::range & r : store.used_ranges(il, done, closed)) {
            rest += r.bytes;
        }
    }
    if (rest != in.size - in.used) {
        throw error(ACTQKV_ERR_STATE, format("state has %llu bytes of K and V, expected %llu",
                                             (unsigned long long) (in.size - in.used), (unsigned long long) rest));
    }

    tokens = std::move(read);
    memory = std::move(new_memory);
    saved = std::move(new_saved);
    n_done = done;
    sources_from = std::min(sources_from, n);
    if (gpu != nullptr) {
        gpu->forget_from(0); // waits for copies of what is overwritten now
    }
    store.set_closed(0); // nothing of a KV file stays
    store.restore_recent(new_recent, done, closed);
    for (int il = 0; il < hp.n_layer; il++) {
        for (const kv_store::range & r : store.used_ranges(il, done, closed)) {
            in.raw(const_cast<void *>(r.data), r.bytes);
        }
    }
    store.take_index();
}

} // namespace actqkv
