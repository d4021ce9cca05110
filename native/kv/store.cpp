#include "store.h"

#include "../kernels/parallel.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace actqkv {

int64_t summary_width(int32_t kind, const hparams & hp) {
    switch (kind) {
    case ACTQKV_SUMMARY_HEAD:
        return hp.n_channels();
    case ACTQKV_SUMMARY_BOUNDS:
        return 2 * hp.n_kv_channels();
    case ACTQKV_SUMMARY_SPREAD:
        return 0;
    default:
        return hp.n_kv_channels();
    }
}

namespace {

bool retrieves(const actqkv_params & p) {
    return p.method.prefill == ACTQKV_RETRIEVE_TOP || p.method.decode == ACTQKV_RETRIEVE_TOP;
}

bool summary_is_spread(const actqkv_params & p) { return retrieves(p) && p.method.summary == ACTQKV_SUMMARY_SPREAD; }

// Of a chunk; and the number of its norms.
int64_t summary_bytes_for(const hparams & hp, const actqkv_params & p) {
    const int64_t in_f16 = summary_width(p.method.summary, hp) * (int64_t) sizeof(actqkv_f16);
    return !retrieves(p) ? 0 : summary_is_spread(p) ? actqkv_spread_bytes(hp.n_head_kv, hp.d_head) : in_f16;
}

int64_t norms_for(const actqkv_params & p) { return retrieves(p) && !summary_is_spread(p); }

int32_t rows_for(const hparams & hp, const actqkv_params & p) {
    if (p.method.granularity == ACTQKV_GRANULARITY_LAYER) {
        return 1;
    }
    return p.method.summary == ACTQKV_SUMMARY_HEAD ? hp.n_head : hp.n_head_kv;
}

// Of a chunk.
int64_t index_bytes_for(const hparams & hp, const actqkv_params & p) {
    return searches(p.method) ? stretches::chunk_bytes(kv_store::layout_for(hp, p)) : 0;
}

int64_t sums_per_layer(const hparams & hp, const actqkv_params & p) {
    const bool most_attended = p.method.summary == ACTQKV_SUMMARY_HEAD || p.method.summary == ACTQKV_SUMMARY_KV_HEAD;
    const bool needed = retrieves(p) && (most_attended || p.method.question_weight > 0.0f);
    return needed ? (int64_t) kv_store::layout_for(hp, p).n_recent_blocks * hp.n_head * p.method.n_chunk_tokens : 0;
}

} // namespace

kv_layout kv_store::layout_for(const hparams & hp, const actqkv_params & p) {
    // The ring must hold every chunk that is not closed when a window ends, and no slot may be shared.
    const int n_recent = (p.n_local + p.n_window) / p.method.n_chunk_tokens + 3;
    return {hp.n_head_kv, hp.d_head, p.n_sink, p.method.n_chunk_tokens, n_recent, p.kv_type};
}

void kv_store::add_memory(const hparams & hp, const actqkv_params & p, actqkv_memory & memory) {
    const kv_layout shape = layout_for(hp, p);
    const uint64_t layers = hp.n_layer, ring = 3 * shape.recent_tokens() * shape.token_stride();
    const uint64_t recent = ring * sizeof(actqkv_f16) + sums_per_layer(hp, p) * sizeof(float);
    memory.kv_bytes += layers * (2 * shape.n_chunks_max(p.n_ctx) * shape.chunk_bytes() + recent);
    const uint64_t of_chunk = summary_bytes_for(hp, p) + norms_for(p) * sizeof(float) + index_bytes_for(hp, p);
    memory.summary_bytes += layers * shape.n_chunks_max(p.n_ctx) * of_chunk;
    if (searches(p.method)) {
        memory.summary_bytes += layers * stretches::rest_bytes(shape);
        memory.compute_bytes += p.n_threads * stretches::scratch_bytes(shape, shape.n_chunks_max(p.n_ctx));
    }
}

kv_store::kv_store(const hparams & hp, const actqkv_params & p)
    : shape(layout_for(hp, p)), n_head(hp.n_head), summary_kind(p.method.summary),
      n_representatives(p.method.n_representatives), n_summary_rows(rows_for(hp, p)),
      stores_near(p.method.positions == ACTQKV_POSITIONS_EXACT),
      summarises_near(stores_near && p.method.summary_keys == ACTQKV_KEYS_ATTENDED), n_sums(sums_per_layer(hp, p)),
      n_summary_bytes(summary_bytes_for(hp, p)), n_norms(norms_for(p)),
      n_chunks_max(retrieves(p) ? shape.n_chunks_max(p.n_ctx) : 0), layers(hp.n_layer),
      indexed(shape, searches(p.method) ? hp.n_layer : 0, n_chunks_max) {
    const uint64_t n_bytes = shape.n_chunks_max(p.n_ctx) * shape.chunk_bytes();
    for (layer & l : layers) {
        l.k = reservation<uint8_t>(n_bytes);
        l.v = reservation<uint8_t>(n_bytes);
        l.reps = reservation<uint8_t>(n_chunks_max * n_summary_bytes);
        l.norms = reservation<float>(n_chunks_max * n_norms);
        for (auto * ring : {&l.near, &l.far, &l.v_open}) {
            ring->resize(shape.recent_tokens() * shape.token_stride());
        }
        l.sums.resize(n_sums);
        l.centre.resize(shape.token_stride());
    }
}

void kv_store::append(int il, int64_t n_past, int m, const actqkv_f16 * near, const actqkv_f16 * far,
                      const actqkv_f16 * v, int64_t stride) {
    layer & l = layers[il];
    const int d = shape.d_head;
    for (int i = 0; i < m;) {
        const int64_t token = n_past + i, block = shape.block_of(token), offset = token - shape.block_first(block);
        const int n = (int) std::min<int64_t>(m - i, shape.block_tokens(block) - offset);
        const size_t bytes = (size_t) n * d * sizeof(actqkv_f16);
        for (int g = 0; g < shape.n_head_kv; g++) {
            const int64_t to = shape.recent_offset(block) + g * shape.head_stride(block) + offset * d;
            const int64_t from = g * stride + (int64_t) i * d;
            memcpy(l.near.data() + to, near + from, bytes);
            memcpy(l.far.data() + to, far + from, bytes);
            memcpy(l.v_open.data() + to, v + from, bytes);
        }
        i += n;
    }
}

actqkv_span kv_store::span(int il, int64_t block, int64_t first, int64_t last, bool both) const {
    const layer & l = layers[il];
    if (block > 0 && block <= n_from_file) {
        check_array(il, FILE_KEYS, block - 1);
        check_array(il, FILE_VALUES, block - 1);
    }
    const int64_t skip = first - shape.block_first(block);
    actqkv_span s = {};
    s.first = first;
    s.n_tok = (int32_t) (last - first);
    if (block > 0 && block <= n_closed_chunks) {
        const int64_t offset = (block - 1) * shape.chunk_bytes() + skip * shape.row_bytes();
        s.kv_type = shape.kv_type;
        s.v_stride = s.far_stride = s.near_stride = shape.tile_bytes();
        (stores_near ? s.near : s.far) = l.k.data() + offset;
        s.v = l.v.data() + offset;
        return s;
    }
    const int64_t offset = shape.recent_offset(block) + skip * shape.d_head;
    s.kv_type = ACTQKV_KV_F16;
    s.v_stride = s.far_stride = s.near_stride = shape.head_stride(block) * (int64_t) sizeof(actqkv_f16);
    s.near = stores_near || both ? (const uint8_t *) (l.near.data() + offset) : nullptr;
    s.far = stores_near ? nullptr : (const uint8_t *) (l.far.data() + offset);
    s.v = (const uint8_t *) (l.v_open.data() + offset);
    return s;
}

void kv_store::clear_sums(int il, int64_t first, int64_t last) {
    for (int64_t token = std::max<int64_t>(first, shape.n_sink); token < last; token++) {
        const int64_t chunk = shape.block_of(token) - 1, at = token - shape.block_first(chunk + 1);
        for (int h = 0; h < n_head; h++) {
            sums_of(il, chunk)[h * shape.n_chunk_tokens + at] = 0.0f;
        }
    }
}

void kv_store::add_sums(int il, int64_t first, int64_t n, const float * sums, int64_t stride) {
    for (int64_t j = 0; j < n;) {
        const int64_t chunk = shape.block_of(first + j) - 1, at = first + j - shape.block_first(chunk + 1);
        const int64_t run = std::min<int64_t>(n - j, shape.n_chunk_tokens - at);
        for (int h = 0; h < n_head; h++) {
            float * to = sums_of(il, chunk) + h * shape.n_chunk_tokens + at;
            const float * from = sums + h * stride + j;
            for (int64_t i = 0; i < run; i++) {
                to[i] += from[i];
            }
        }
        j += run;
    }
}

void kv_store::close_until(int64_t limit, int n_threads) {
    const int64_t last = n_closed_at(limit);
    if (last <= n_closed_chunks) {
        return;
    }
    const bool spreads = summary_kind == ACTQKV_SUMMARY_SPREAD;
    std::vector<actqkv_f16> reps(spreads ? 0 : n_threads * width());
    parallel(n_threads, [&](int ith, int nth) {
        for (size_t il = ith; il < layers.size(); il += nth) {
            for (int64_t b = n_closed_chunks; b < last; b++) {
                store_chunk((int) il, b);
                if (summarises() && !spreads) {
                    summarize((int) il, b, reps.data() + ith * width());
                }
            }
            if (summarises() && spreads) {
                spread((int) il, n_closed_chunks, last);
            }
        }
    });
    n_closed_chunks = last;
    index_until(last, false, n_threads);
}

// Of a file, only keys of chunks in short stretches are read, and checked, here.
void kv_store::index_until(int64_t n_closed, bool all, int n_threads) {
    const int64_t first = indexed.exist() ? indexed.first_missing(n_closed, all) : n_closed;
    if (first == n_closed && !all) {
        return;
    }
    std::vector<const uint8_t *> keys;
    std::vector<float> common(layers.size() * shape.token_stride());
    for (size_t il = 0; il < layers.size(); il++) {
        const layer & l = layers[il];
        keys.push_back(l.k.data());
        actqkv_mean((stores_near ? l.near : l.far).data(), shape.head_stride(0), shape.n_head_kv, shape.d_head,
                    shape.n_sink, common.data() + il * shape.token_stride());
        for (int64_t chunk = first; chunk < n_from_file; chunk++) {
            check_array((int) il, FILE_KEYS, chunk);
        }
    }
    indexed.make(n_closed, all, keys, common, n_threads);
}

void kv_store::index_keys(int n_threads) {
    if (indexed.exist() && !indexed.is_whole(n_closed_chunks)) {
        index_until(n_closed_chunks, true, n_threads);
    }
}

void kv_store::repeat_chunks(int64_t n, int64_t n_tokens, int n_threads) {
    const recent_state open = save_recent(n_tokens);
    const int64_t n_before = n_closed_chunks, n_after = n_before + n;
    for (size_t il = 0; il < layers.size(); il++) {
        auto arrays = chunk_arrays((int) il);
        arrays[FILE_INDEX].chunk_bytes = 0; // made anew
        for (const chunk_array & array : arrays) {
            const uint64_t bytes = array.chunk_bytes / array.n_rows;
            for (int64_t i = 0; i < array.n_rows; i++) {
                uint8_t * row = array.data + i * array.row_stride;
                for (int64_t chunk = n_before; chunk < n_after; chunk += n_before) {
                    memcpy(row + chunk * bytes, row, std::min(n_before, n_after - chunk) * bytes);
                }
            }
        }
    }
    restore_recent(open, n_tokens + n * shape.n_chunk_tokens, n_after);
    index_until(n_after, false, n_threads);
}

void kv_store::store_chunk(int il, int64_t chunk) {
    layer & l = layers[il];
    const int64_t from = shape.recent_offset(chunk + 1), to = chunk * shape.chunk_bytes();
    const int64_t n_rows = (int64_t) shape.n_head_kv * shape.n_chunk_tokens;
    const auto & keys = stores_near ? l.near : l.far;
    actqkv_store_rows(shape.kv_type, true, keys.data() + from, n_rows, shape.d_head, l.k.data() + to);
    actqkv_store_rows(shape.kv_type, false, l.v_open.data() + from, n_rows, shape.d_head, l.v.data() + to);
}

// Spreads of chunks [first, last). What all keys have in common is the mean of the sinks', which stay where they are.
void kv_store::spread(int il, int64_t first, int64_t last) {
    const actqkv_f16 * keys = (summarises_near ? layers[il].near : layers[il].far).data();
    std::vector<float> & centre = layers[il].centre;
    actqkv_mean(keys, shape.head_stride(0), shape.n_head_kv, shape.d_head, shape.n_sink, centre.data());
    for (int64_t chunk = first; chunk < last; chunk++) {
        actqkv_spread(keys + shape.recent_offset(chunk + 1), shape.head_stride(chunk + 1), centre.data(),
                      shape.n_head_kv, shape.d_head, shape.n_chunk_tokens,
                      layers[il].reps.data() + chunk * n_summary_bytes);
    }
}

// rep: room for one summary.
void kv_store::summarize(int il, int64_t chunk, actqkv_f16 * rep) {
    layer & l = layers[il];
    const actqkv_f16 * keys = (summarises_near ? l.near : l.far).data() + shape.recent_offset(chunk + 1);
    actqkv_summarize(actqkv_impl_best(), summary_kind, n_representatives, keys, shape.head_stride(chunk + 1),
                     n_sums > 0 ? sums_of(il, chunk) : nullptr, shape.n_chunk_tokens, n_head, shape.n_head_kv,
                     shape.d_head, shape.n_chunk_tokens, rep, l.norms.data() + chunk);
    actqkv_f16 * reps = (actqkv_f16 *) l.reps.data();
    if (n_summary_rows == 1) {
        std::copy_n(rep, width(), reps + chunk * width());
        return;
    }
    const int n_parts = summary_kind == ACTQKV_SUMMARY_BOUNDS ? 2 : 1, d = shape.d_head;
    for (int i = 0; i < n_summary_rows; i++) {
        for (int part = 0; part < n_parts; part++) {
            std::copy_n(rep + (part * n_summary_rows + i) * d, d,
                        reps + i * row_stride() + (chunk * n_parts + part) * d);
        }
    }
}

uint64_t kv_store::recent_kv(int64_t n_tokens, int64_t n_closed) const {
    const int64_t n = shape.n_open_blocks(n_tokens, n_closed) * shape.n_chunk_tokens * shape.token_stride();
    return layers.size() * 3 * n;
}

uint64_t kv_store::recent_sums(int64_t n_tokens, int64_t n_closed) const {
    const int64_t n = shape.n_open_blocks(n_tokens, n_closed) * n_head * shape.n_chunk_tokens;
    return n_sums > 0 ? layers.size() * n : 0;
}

recent_state kv_store::save_recent(int64_t n_tokens) const {
    recent_state state;
    const int64_t end = n_closed_chunks + shape.n_open_blocks(n_tokens, n_closed_chunks);
    const int64_t n_kv = shape.n_chunk_tokens * shape.token_stride(), n_sum = n_head * shape.n_chunk_tokens;
    state.kv.reserve(recent_kv(n_tokens, n_closed_chunks));
    state.sums.reserve(recent_sums(n_tokens, n_closed_chunks));
    for (const layer & l : layers) {
        for (int64_t chunk = n_closed_chunks; chunk < end; chunk++) {
            for (const auto * ring : {&l.near, &l.far, &l.v_open}) {
                const auto from = ring->begin() + shape.recent_offset(chunk + 1);
                state.kv.insert(state.kv.end(), from, from + n_kv);
            }
            if (n_sums > 0) {
                const auto from = l.sums.begin() + chunk % shape.n_recent_blocks * n_sum;
                state.sums.insert(state.sums.end(), from, from + n_sum);
            }
        }
    }
    return state;
}

void kv_store::restore_recent(const recent_state & state, int64_t n_tokens, int64_t n_closed) {
    const int64_t end = n_closed + shape.n_open_blocks(n_tokens, n_closed);
    const int64_t n_kv = shape.n_chunk_tokens * shape.token_stride(), n_sum = n_head * shape.n_chunk_tokens;
    const actqkv_f16 * kv = state.kv.data();
    const float * sums = state.sums.data();
    for (layer & l : layers) {
        for (int64_t chunk = n_closed; chunk < end; chunk++) {
            for (auto * ring : {&l.near, &l.far, &l.v_open}) {
                std::copy_n(kv, n_kv, ring->begin() + shape.recent_offset(chunk + 1));
                kv += n_kv;
            }
            if (n_sums > 0) {
                std::copy_n(sums, n_sum, l.sums.begin() + chunk % shape.n_recent_blocks * n_sum);
                sums += n_sum;
            }
        }
    }
    set_closed(n_closed);
}

void kv_store::set_closed(int64_t n) {
    n_closed_chunks = n;
    n_from_file = std::min(n_from_file, n); // chunks behind it will be written anew
    indexed.forget_from(n);
}

std::vector<kv_store::range> kv_store::sink_ranges(int il) const {
    const layer & l = layers[il];
    const uint64_t bytes = shape.n_sink * shape.token_stride() * sizeof(actqkv_f16);
    return {{l.near.data(), bytes}, {l.far.data(), bytes}, {l.v_open.data(), bytes}};
}

std::vector<kv_store::range> kv_store::used_ranges(int il, int64_t n_tokens, int64_t n_closed) const {
    const layer & l = layers[il];
    std::vector<range> ranges;
    if (n_tokens > 0) {
        ranges = sink_ranges(il);
    }
    for (const auto * array : {&l.k, &l.v}) {
        ranges.push_back({array->data(), (uint64_t) n_closed * shape.chunk_bytes()});
    }
    if (summarises() && n_closed > 0) {
        const int64_t row_bytes = n_summary_bytes / n_summary_rows;
        for (int i = 0; i < n_summary_rows; i++) {
            ranges.push_back({l.reps.data() + i * n_chunks_max * row_bytes, (uint64_t) (n_closed * row_bytes)});
        }
        ranges.push_back({l.norms.data(), n_closed * n_norms * sizeof(float)});
    }
    if (indexed.exist()) {
        const uint64_t n = kv_file::n_kept(FILE_INDEX, n_closed, shape.n_chunk_tokens);
        ranges.push_back({indexed.data(il), n * stretches::longest_bytes(shape)});
    }
    return ranges;
}

// ---- KV files

std::array<uint64_t, N_FILE_ARRAYS> kv_store::chunk_bytes(const hparams & hp, const actqkv_params & p) {
    const uint64_t kv = layout_for(hp, p).chunk_bytes();
    return {kv, kv, (uint64_t) summary_bytes_for(hp, p), norms_for(p) * sizeof(float),
            searches(p.method) ? (uint64_t) stretches::longest_bytes(layout_for(hp, p)) : 0};
}

std::array<chunk_array, N_FILE_ARRAYS> kv_store::chunk_arrays(int il) const {
    const layer & l = layers[il];
    const uint64_t kv = shape.chunk_bytes();
    const auto array = [](const auto * data, uint64_t bytes, int64_t n_rows = 1, int64_t row_stride = 0) {
        return chunk_array{(uint8_t *) data, bytes, n_rows, row_stride * sizeof(*data)};
    };
    return {array(l.k.data(), kv), array(l.v.data(), kv),
            array(l.reps.data(), n_summary_bytes, n_summary_rows, n_chunks_max * n_summary_bytes / n_summary_rows),
            array(l.norms.data(), n_norms * sizeof(float)),
            array(indexed.exist() ? indexed.data(il) : nullptr, indexed.exist() ? stretches::longest_bytes(shape) : 0)};
}

void kv_store::write_chunks(kv_file & file, int64_t first, int64_t last) const {
    for (size_t il = 0; il < layers.size(); il++) {
        const auto arrays = chunk_arrays((int) il);
        for (int a = 0; a < N_FILE_ARRAYS; a++) {
            const int64_t from = kv_file::n_kept(a, first, shape.n_chunk_tokens);
            file.write_chunks((int) il, a, from, kv_file::n_kept(a, last, shape.n_chunk_tokens), arrays[a]);
        }
    }
}

void kv_store::map_from(std::shared_ptr<const kv_file> file) {
    source = std::move(file);
    if (!guards.empty()) {
        return;
    }
    for (layer & l : layers) {
        guards.emplace_back(l.k.data(), l.k.bytes());
        guards.emplace_back(l.v.data(), l.v.bytes());
        guards.emplace_back(l.reps.data(), l.reps.bytes());
        guards.emplace_back(l.norms.data(), l.norms.bytes());
    }
    for (size_t il = 0; indexed.exist() && il < layers.size(); il++) {
        guards.emplace_back(indexed.data((int) il), indexed.n_bytes((int) il));
    }
}

void kv_store::spill(std::shared_ptr<const kv_file> file, int64_t n) {
    const int64_t first = source == file ? std::min(n_spilled, n) : 0; // of another file nothing is mapped yet
    map_from(file);
    const uint64_t granule = kv_file::map_granule();
    for (size_t il = 0; il < layers.size(); il++) {
        const auto arrays = chunk_arrays((int) il);
        for (int a = 0; a < N_FILE_ARRAYS; a++) {
            const uint64_t bytes = arrays[a].chunk_bytes;
            const uint64_t begin = kv_file::n_kept(a, first, shape.n_chunk_tokens) * bytes / granule * granule;
            const uint64_t end = kv_file::n_kept(a, n, shape.n_chunk_tokens) * bytes / granule * granule;
            const bool mapped = file->map((int) il, a, begin, end, arrays[a]);
            // A chunk that was closed again after a rewind has the bits that the file has (native/README.md, Sameness).
            if (mapped && begin > 0 && (a == FILE_KEYS || a == FILE_VALUES)) {
                madvise(arrays[a].data, begin, MADV_DONTNEED);
            }
        }
    }
    n_spilled = n;
}

void kv_store::take_chunks(std::shared_ptr<const kv_file> file, int64_t n) {
    map_from(file);
    const uint64_t granule = kv_file::map_granule();
    for (size_t il = 0; il < layers.size(); il++) {
        const auto arrays = chunk_arrays((int) il);
        for (int a = 0; a < N_FILE_ARRAYS; a++) {
            const int64_t n_there = kv_file::n_kept(a, n, shape.n_chunk_tokens);
            const uint64_t end = (n_there * arrays[a].chunk_bytes + granule - 1) / granule * granule;
            if (!file->map((int) il, a, 0, end, arrays[a])) {
                file->read_chunks((int) il, a, n_there, arrays[a]);
            }
        }
    }
    checked.assign(layers.size() * N_FILE_ARRAYS * n, 0);
    summaries_checked.assign(layers.size(), 0);
    index_checked.assign(layers.size(), 0);
    n_from_file = n_spilled = n_closed_chunks = n;
    indexed.adopt(n);
}

void kv_store::check_file() const {
    if (source == nullptr) {
        return;
    }
    source->check_size();
    if (std::any_of(guards.begin(), guards.end(), [](const guard & g) { return g.failed(); })) {
        throw error(ACTQKV_ERR_STATE, format("%s could not be read: it was cut short, or its disk failed, while it was "
                                             "open",
                                             source->name()));
    }
}

uint8_t & kv_store::was_checked(int il, file_array array, int64_t chunk) const {
    const size_t n = checked.size() / (layers.size() * N_FILE_ARRAYS);
    return checked[(il * N_FILE_ARRAYS + array) * n + chunk];
}

void kv_store::check_array(int il, file_array array, int64_t chunk) const {
    uint8_t & done = was_checked(il, array, chunk);
    if (done == 0) {
        source->check_chunk(il, array, chunk, chunk_arrays(il)[array]);
        done = 1;
    }
}

void kv_store::fetch_chunks(int il, file_array array, const int32_t * chunks, int64_t n) const {
    if (n_from_file == 0) {
        return;
    }
    const chunk_array from = chunk_arrays(il)[array];
    const uint64_t granule = kv_file::map_granule();
    const auto is_wanted = [&](int64_t chunk) { return chunk < n_from_file && !was_checked(il, array, chunk); };
    for (int64_t i = 0, end; i < n && from.n_rows == 1; i = end) {
        end = i + 1;
        if (!is_wanted(chunks[i])) {
            continue;
        }
        while (end < n && chunks[end] == chunks[end - 1] + 1 && is_wanted(chunks[end])) {
            end++;
        }
        uint8_t * first = from.data + chunks[i] * from.chunk_bytes;
        uint8_t * last = from.data + (chunks[end - 1] + 1) * from.chunk_bytes;
        first -= (uintptr_t) first % granule;
        madvise(first, last - first, MADV_WILLNEED);
    }
}

void kv_store::check_chunks(int il, file_array array, const int32_t * chunks, int64_t n) const {
    fetch_chunks(il, array, chunks, n);
    for (int64_t i = 0; i < n; i++) {
        if (chunks[i] < n_from_file) {
            check_array(il, array, chunks[i]);
        }
    }
}

void kv_store::check_between(int64_t first, int64_t last) const {
    for (size_t il = 0; il < layers.size(); il++) {
        for (int a = 0; a < N_FILE_ARRAYS; a++) {
            const int64_t end = kv_file::n_kept(a, std::min(last, n_from_file), shape.n_chunk_tokens);
            for (int64_t chunk = first; chunk < end; chunk++) {
                check_array((int) il, (file_array) a, chunk);
            }
        }
    }
}

// Of the stretches that the file had some may be dropped by now.
void kv_store::check_index(int il) const {
    if (n_from_file == 0 || index_checked[il] != 0) {
        return;
    }
    for (int64_t i = 0; i < kv_file::n_kept(FILE_INDEX, n_from_file, shape.n_chunk_tokens); i++) {
        check_array(il, FILE_INDEX, i);
        if (!indexed.is_sound(il, i)) {
            throw error(ACTQKV_ERR_STATE, format("%s is damaged: its index is inconsistent", source->name()));
        }
    }
    index_checked[il] = 1;
}

// What is not as it should be will be made anew.
void kv_store::take_index() {
    const int64_t n = kv_file::n_kept(FILE_INDEX, indexed.exist() ? n_closed_chunks : 0, shape.n_chunk_tokens);
    int64_t i = 0;
    for (bool sound = true; i < n && sound; i += sound) {
        for (size_t il = 0; il < layers.size(); il++) {
            sound = sound && indexed.is_sound((int) il, i);
        }
    }
    indexed.adopt(i * stretch_chunks(shape.n_chunk_tokens));
}

void kv_store::check_summaries(int il) const {
    if (n_from_file == 0 || summaries_checked[il] != 0) {
        return;
    }
    for (int64_t chunk = 0; chunk < n_from_file; chunk++) {
        check_array(il, FILE_SUMMARIES, chunk);
        check_array(il, FILE_NORMS, chunk);
    }
    summaries_checked[il] = 1;
}

} // namespace actqkv
