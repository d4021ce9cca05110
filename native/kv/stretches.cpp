#include "stretches.h"

#include "../kernels/parallel.h"

#include <algorithm>

namespace actqkv {
namespace {

constexpr std::array<int64_t, 4> LEVELS = {STRETCH_TOKENS, 16384, 4096, 1024};
constexpr size_t N_WHILE_READING = 2; // of them: what is left then is made fast

int64_t padded(int64_t n_bytes) { return (n_bytes + 63) / 64 * 64; }

// Chunks of a stretch of so many tokens; 0 where that would be one, or none.
int64_t chunks_of(const kv_layout & layout, int64_t n_tokens) {
    const int64_t n = n_tokens / layout.n_chunk_tokens;
    return n > 1 ? n : 0;
}

int64_t bytes_of(const kv_layout & layout, int64_t n_chunks, int32_t in_order) {
    return padded(actqkv_stretch_bytes(layout.d_head, n_chunks * layout.n_chunk_tokens, in_order));
}

uint8_t * aligned(std::vector<uint8_t> & bytes) { return bytes.data() + (64 - (uintptr_t) bytes.data() % 64) % 64; }

} // namespace

int64_t stretches::chunk_bytes(const kv_layout & layout) {
    int64_t most = 0;
    for (const int64_t n_tokens : LEVELS) {
        if (const int64_t n = chunks_of(layout, n_tokens)) {
            most = std::max(most, padded((layout.n_head_kv * bytes_of(layout, n, 0) + n - 1) / n));
        }
    }
    return most;
}

// There is room for as many chunks as may be left over.
actqkv_stretch stretches::sizes_of_rest(const kv_layout & layout) {
    const int32_t c = layout.n_chunk_tokens;
    int64_t least = 1; // of a divided stretch
    for (const int64_t n_tokens : LEVELS) {
        least = chunks_of(layout, n_tokens) ? chunks_of(layout, n_tokens) : least;
    }
    return {nullptr, bytes_of(layout, least - 1, c), 0, (least - 1) * c, c};
}

std::vector<actqkv_stretch> stretches::most_of(const kv_layout & layout, int64_t n_chunks) {
    const int32_t c = layout.n_chunk_tokens;
    std::vector<actqkv_stretch> all;
    int64_t left = n_chunks;
    for (const int64_t n_tokens : LEVELS) {
        if (const int64_t n = chunks_of(layout, n_tokens)) {
            all.insert(all.end(), left / n, {nullptr, 0, 0, n * c, 0});
            left = std::min(left, n - 1); // whatever is left over of all
        }
    }
    all.push_back(sizes_of_rest(layout));
    return all;
}

int64_t stretches::n_cells_most(const std::vector<actqkv_stretch> & all) {
    int64_t n = 0;
    for (const actqkv_stretch & s : all) {
        n += actqkv_stretch_cells(s.n_keys, s.in_order);
    }
    return n;
}

uint64_t stretches::scratch_bytes(const kv_layout & layout, int64_t n_chunks) {
    const int64_t n = std::min(n_chunks, stretch_chunks(layout.n_chunk_tokens));
    return padded(actqkv_stretch_scratch(layout.d_head, n * layout.n_chunk_tokens));
}

stretches::stretches(const kv_layout & layout, int n_layer, int64_t n_chunks_max)
    : shape(layout), slot_bytes(chunk_bytes(layout)) {
    for (int il = 0; il < n_layer; il++) {
        layer l;
        l.bytes = reservation<uint8_t>(n_chunks_max * slot_bytes);
        l.rest = reservation<uint8_t>(rest_bytes(layout));
        l.views.reserve(n_chunks_max / stretch_chunks(layout.n_chunk_tokens) + 4 * LEVELS.size());
        layers.push_back(std::move(l));
    }
}

std::vector<stretches::run> stretches::runs_of(int64_t n_closed, size_t n_levels) const {
    std::vector<run> runs;
    int64_t first = 0;
    for (size_t level = 0; level < n_levels; level++) {
        const int64_t n = chunks_of(shape, LEVELS[level]);
        for (; n > 0 && first + n <= n_closed; first += n) {
            runs.push_back({first, n});
        }
    }
    return runs;
}

actqkv_stretch stretches::view(const layer & l, const run & r) const {
    return {l.bytes.data() + r.first * slot_bytes, bytes_of(shape, r.n, 0), r.first, r.n * shape.n_chunk_tokens, 0};
}

actqkv_stretch stretches::view_of_rest(const layer & l) const {
    actqkv_stretch found = sizes_of_rest(shape);
    found.data = l.rest.data();
    found.first_chunk = rest.first;
    return found;
}

void stretches::show() {
    for (layer & l : layers) {
        l.views.clear();
        for (const run & r : made) {
            l.views.push_back(view(l, r));
        }
        if (rest.n > 0) {
            l.views.push_back(view_of_rest(l));
        }
    }
}

int64_t stretches::end_of(const std::vector<run> & runs) {
    return runs.empty() ? 0 : runs.back().first + runs.back().n;
}

int64_t stretches::first_missing(int64_t n_closed, bool all) const {
    const std::vector<run> wanted = runs_of(n_closed, all ? LEVELS.size() : N_WHILE_READING);
    const auto differ = std::mismatch(wanted.begin(), wanted.end(), made.begin(), made.end());
    if (differ.first != wanted.end() || !all) {
        return differ.first == wanted.end() ? n_closed : differ.first->first;
    }
    const int64_t first = end_of(wanted);
    return rest.first == first ? first + rest.n : first;
}

void stretches::make(int64_t n_closed, bool all, const std::vector<const uint8_t *> & keys,
                     const std::vector<float> & common, int n_threads) {
    const std::vector<run> wanted = runs_of(n_closed, all ? LEVELS.size() : N_WHILE_READING);
    const size_t n_kept = std::mismatch(wanted.begin(), wanted.end(), made.begin(), made.end()).first - wanted.begin();
    if (n_kept == wanted.size() && !all) {
        return;
    }
    made.resize(n_kept);
    const int64_t G = shape.n_head_kv, n_runs = wanted.size() - n_kept, n_jobs = n_runs * layers.size() * G;
    int64_t longest_run = 1;
    for (size_t i = n_kept; i < wanted.size(); i++) {
        longest_run = std::max(longest_run, wanted[i].n);
    }
    const uint64_t of_thread = scratch_bytes(shape, longest_run);
    std::vector<uint8_t> scratch(n_threads * of_thread + 64);
    parallel(n_jobs > 0 ? n_threads : 1, [&](int ith, int nth) {
        for (int64_t job = ith; job < n_jobs; job += nth) {
            const run & r = wanted[n_kept + job % n_runs];
            const int64_t il = job / n_runs / G, g = job / n_runs % G;
            const actqkv_stretch s = view(layers[il], r);
            actqkv_make_stretch(
                actqkv_impl_best(), shape.kv_type, keys[il] + r.first * shape.chunk_bytes() + g * shape.tile_bytes(),
                shape.chunk_bytes(), shape.n_chunk_tokens, (int32_t) r.n, common.data() + (il * G + g) * shape.d_head,
                shape.d_head, const_cast<uint8_t *>(s.data) + g * s.head_stride, aligned(scratch) + ith * of_thread);
        }
    });
    made = wanted;
    const int64_t first = end_of(made), n_rest = all ? n_closed - first : 0;
    const int64_t n_there = rest.first == first ? std::min(rest.n, n_rest) : 0;
    parallel(n_there < n_rest ? n_threads : 1, [&](int ith, int nth) {
        for (int64_t head = ith; head < (int64_t) layers.size() * G; head += nth) {
            const int64_t il = head / G, g = head % G;
            const actqkv_stretch s = view_of_rest(layers[il]);
            for (int64_t i = n_there; i < n_rest; i++) {
                actqkv_add_chunk(actqkv_impl_best(), shape.kv_type,
                                 keys[il] + (first + i) * shape.chunk_bytes() + g * shape.tile_bytes(),
                                 shape.n_chunk_tokens, common.data() + head * shape.d_head, shape.d_head, s.n_keys, i,
                                 const_cast<uint8_t *>(s.data) + g * s.head_stride, aligned(scratch) + ith * of_thread);
            }
        }
    });
    rest = {first, n_rest};
    show();
}

// Of the rest nothing stays: it is few chunks.
void stretches::forget_from(int64_t n) {
    const auto is_kept = [=](const run & r) { return r.first + r.n <= n; };
    made.erase(std::find_if_not(made.begin(), made.end(), is_kept), made.end());
    rest = {0, 0};
    show();
}

void stretches::adopt(int64_t n) {
    made = runs_of(n, 1);
    rest = {0, 0};
    show();
}

bool stretches::is_sound(int il, int64_t i) const {
    const int64_t n = chunks_of(shape, LEVELS.front());
    const actqkv_stretch s = view(layers[il], {i * n, n});
    bool sound = true;
    for (int64_t g = 0; g < shape.n_head_kv; g++) {
        sound =
            sound && actqkv_stretch_is_sound(s.data + g * s.head_stride, shape.d_head, s.n_keys, shape.n_chunk_tokens);
    }
    return sound;
}

} // namespace actqkv
