// Sessions and KV files (kv/file.h): writing a reading as it goes, and standing where it stood.
//
// Payload of a slot: layer memories, recent state (remainder and local), then per layer the sinks; arrays as in states. A
// checkpoint lies where a window starts, so what follows it is read as if nothing had happened; tokens of an unfinished last
// window are pending after opening, and are read with whatever comes next.
#include "session.h"

#include "../error.h"
#include "serial.h"

#include <cstring>

namespace actqkv {
namespace {

// While a checkpoint is on its way to the disk the reading goes on, at most so many of their distances past the last one.
constexpr int64_t MOST_BEHIND = 4;

actqkv_params params_of(const kv_file & file, int32_t n_ctx, int32_t n_threads) {
    actqkv_params params = file.header().params;
    params.n_ctx = n_ctx;
    params.n_threads = n_threads;
    if (file.header().n_tokens > n_ctx) {
        throw error(ACTQKV_ERR_FULL, format("%s holds %lld tokens, n_ctx is %d: give room for these and for a question",
                                            file.name(), (long long) file.header().n_tokens, n_ctx));
    }
    return params;
}

// The most that a payload can have, whatever was read.
uint64_t slot_bytes_for(const hparams & hp, const kv_layout & shape) {
    const uint64_t E = hp.n_channels();
    const uint64_t learnt = (3 + N_QUESTION_QUERIES) * E * sizeof(float) + N_QUESTION_QUERIES * sizeof(float) +
                            N_ENTROPIES * sizeof(double) + 8 * sizeof(uint64_t);
    const uint64_t tokens =
        shape.recent_tokens() * (3 * shape.token_stride() * sizeof(actqkv_f16) + hp.n_head * sizeof(float));
    return hp.n_layer * (learnt + tokens) + 4096; // the slot's own header, counts
}

} // namespace

// ---- open

session::session(const llama_model * model, const std::string & path, int32_t n_ctx, int32_t n_threads, bool write)
    : session(model, kv_file::open(path, write), n_ctx, n_threads, write) {}

session::session(const llama_model * model, kv_file && opened, int32_t n_ctx, int32_t n_threads, bool write)
    : session(model, params_of(opened, n_ctx, n_threads)) {
    auto shared = std::make_shared<kv_file>(std::move(opened));
    take(shared);
    if (write) {
        file = std::move(shared);
        n_written = file->last().n_done;
        n_written_chunks = file->last().n_closed;
    }
}

// All that can be wrong is found before anything is mapped.
void session::take(std::shared_ptr<kv_file> from) {
    const file_header & head = from->header();
    const char * name = from->name();
    if (head.model != model_fingerprint(hp, tensors)) {
        throw error(ACTQKV_ERR_STATE, format("%s is of another model", name));
    }
    const auto chunk_bytes = kv_store::chunk_bytes(hp, params);
    const bool same_sizes = std::equal(chunk_bytes.begin(), chunk_bytes.end(), head.chunk_bytes);
    if (head.n_layer != hp.n_layer || head.n_chunks != store.layout().n_chunks_max(head.n_tokens) || !same_sizes) {
        throw error(ACTQKV_ERR_STATE, format("%s is inconsistent: its sizes are not those of its parameters", name));
    }
    planned.tokens = from->tokens();
    planned.phases = from->phases();
    check_history(planned, hp, name);
    const int64_t done = from->last().n_done, closed = from->last().n_closed;
    tokens = planned;
    if (!from->last().complete) {
        tokens.truncate(done);
    }
    if (done == 0) {
        return;
    }
    if (closed != store.n_closed_at(done - params.n_local)) {
        throw error(ACTQKV_ERR_STATE, format("%s is inconsistent: %lld chunks are closed after %lld tokens", name,
                                             (long long) closed, (long long) done));
    }
    const std::vector<uint8_t> payload = from->take_payload();
    reader in = {payload.data(), payload.size()};
    std::vector<layer_memory> new_memory = read_memory(in, hp);
    const recent_state recent = read_recent(in, store, done, closed);
    uint64_t sinks = 0;
    for (const kv_store::range & r : store.sink_ranges(0)) {
        sinks += hp.n_layer * r.bytes;
    }
    if (sinks != in.size - in.used) {
        throw error(ACTQKV_ERR_STATE, format("the checkpoint of %s has %llu bytes of sinks, expected %llu", name,
                                             (unsigned long long) (in.size - in.used), (unsigned long long) sinks));
    }
    memory = std::move(new_memory);
    store.take_chunks(from, closed);
    store.restore_recent(recent, done, closed);
    for (int il = 0; il < hp.n_layer; il++) {
        for (const kv_store::range & r : store.sink_ranges(il)) {
            in.raw(const_cast<void *>(r.data), r.bytes);
        }
    }
    n_done = done;
    keep_checkpoint();
}

// ---- write

void session::require_file() const {
    if (file == nullptr) {
        throw error(ACTQKV_ERR_ARGUMENT, "the session writes no KV file");
    }
}

void session::file_begin(const std::string & path, history && reading, const uint8_t * section, uint64_t section_bytes,
                         int32_t checkpoint_tokens) {
    if (checkpoint_tokens < 1) {
        throw error(ACTQKV_ERR_ARGUMENT, format("checkpoint_tokens is %d, expected at least 1", checkpoint_tokens));
    }
    if (file != nullptr) {
        throw error(ACTQKV_ERR_ARGUMENT, "the session writes a KV file already");
    }
    check_tokens(reading.tokens.data() + std::min(tokens.size(), reading.size()),
                 std::max<int64_t>(0, reading.size() - tokens.size()));
    check_history(reading, hp, "the reading");
    file_header head = {};
    head.model = model_fingerprint(hp, tensors);
    head.n_tokens = reading.size();
    head.section_bytes = section_bytes;
    head.slot_bytes = slot_bytes_for(hp, store.layout());
    head.n_chunks = store.layout().n_chunks_max(reading.size());
    head.n_layer = hp.n_layer;
    head.checkpoint_tokens = checkpoint_tokens;
    const auto chunk_bytes = kv_store::chunk_bytes(hp, params);
    std::copy(chunk_bytes.begin(), chunk_bytes.end(), head.chunk_bytes);
    head.params = params;
    file =
        std::make_shared<kv_file>(kv_file::create(path, head, reading.tokens.data(), reading.phases.data(), section));
    planned = std::move(reading);
    spilling = false;
    n_written = n_written_chunks = 0;
}

void session::file_spill(bool on) {
    require_file();
    spilling = on;
}

std::vector<uint8_t> session::make_payload() const {
    std::vector<uint8_t> payload;
    for (const bool counting : {true, false}) {
        writer out = {counting ? nullptr : payload.data()};
        write_memory(out, memory);
        write_recent(out, store, n_done);
        for (int il = 0; il < hp.n_layer; il++) {
            for (const kv_store::range & r : store.sink_ranges(il)) {
                out.raw(r.data, r.bytes);
            }
        }
        payload.resize(out.used);
    }
    return payload;
}

// At the start of a window: chunks that have closed go to the file, and out of memory where it stands for them.
void session::write_closed() {
    store.check_file();
    const bool as_planned =
        n_done <= planned.size() &&
        std::equal(planned.tokens.begin(), planned.tokens.begin() + n_done, tokens.tokens.begin()) &&
        std::equal(planned.phases.begin(), planned.phases.begin() + n_done, tokens.phases.begin());
    if (!as_planned) {
        throw error(ACTQKV_ERR_ARGUMENT, "the session reads other tokens than its KV file was begun for");
    }
    close_chunks(n_done);
    const int64_t first = n_written_chunks, last = store.n_closed();
    store.check_between(first, last); // of another file: damage must not be written with a checksum that fits
    store.write_chunks(*file, first, last);
    n_written_chunks = std::max(first, last);
    n_written = n_done;
    if (spilling) {
        if (gpu != nullptr) {
            gpu->unpin();
        }
        store.spill(file, last);
    }
}

void session::write_checkpoint(bool complete) {
    write_closed();
    file->write_slot({n_done, store.n_closed(), complete, make_payload()});
}

void session::write_what_is_due() {
    const int64_t distance = file->header().checkpoint_tokens;
    if (n_done - n_written < distance || n_done % params.n_window != 0) {
        return;
    }
    if (file->busy() && n_done - file->last().n_done < MOST_BEHIND * distance) {
        write_closed();
    } else {
        write_checkpoint(false);
    }
}

// The last point of the history where a window of the reading starts.
int64_t session::last_window_start() const {
    const int64_t n = tokens.size();
    if (n == 0 || n % params.n_window == 0 || tokens.phases[n - 1] == ACTQKV_DECODE ||
        (n < planned.size() && planned.starts_window(n, params.n_window))) {
        return n;
    }
    return tokens.window_start(n - 1, params.n_window);
}

// Back, or on, to where a checkpoint can lie; none is on its way then.
void session::settle() {
    require_file();
    file->finish();
    const int64_t at = last_window_start();
    if (at < n_done) {
        restore(at);
    }
    try {
        while (n_done < at) {
            run_next(tokens.size());
        }
    } catch (...) { // as in decode
        restore(n_done);
        throw;
    }
}

void session::file_sync() {
    settle();
    if (n_done > file->last().n_done) {
        write_checkpoint(false);
    }
    file->finish();
}

void session::file_end() {
    settle();
    if (tokens.size() < planned.size()) {
        file_sync();
        throw error(ACTQKV_ERR_ARGUMENT, format("%lld of the reading's %lld tokens were read",
                                                (long long) tokens.size(), (long long) planned.size()));
    }
    write_checkpoint(true);
    write_checkpoint(true); // in both slots: damage to one of them costs nothing
    file->finish();
    file_leave();
}

void session::file_leave() {
    if (file != nullptr) {
        file->end_writing();
        file = nullptr;
    }
}

} // namespace actqkv
