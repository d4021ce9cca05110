#include "hot_chunks.h"

#include "../error.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace actqkv {
namespace {

constexpr double FADING = 0.9; // of heat, per plan: ten plans ago counts a third

constexpr double MIB = 1024.0 * 1024.0;

// FADING to the power of n: from a table where it is not next to nothing, since a plan asks for every slot.
double faded(uint64_t n) {
    constexpr size_t N_POWERS = 256;
    static const std::array<double, N_POWERS> powers = [] {
        std::array<double, N_POWERS> all = {};
        for (size_t i = 0; i < N_POWERS; i++) {
            all[i] = std::pow(FADING, (double) i);
        }
        return all;
    }();
    return n < N_POWERS ? powers[n] : std::pow(FADING, (double) n);
}

} // namespace

int32_t hot_chunks::n_slots_for(int n_layer, uint64_t chunk_bytes, uint64_t byte_limit) {
    return (int32_t) std::min<uint64_t>(byte_limit / ((uint64_t) n_layer * chunk_bytes), INT32_MAX);
}

uint64_t hot_chunks::least_bytes(int n_layer, uint64_t chunk_bytes, int32_t n_most) {
    return (uint64_t) n_layer * chunk_bytes * (uint64_t) n_most;
}

hot_chunks::hot_chunks(int n_layer, uint64_t chunk_bytes, uint64_t byte_limit, int32_t n_most, mover & copies)
    : chunk_bytes(chunk_bytes), n_most(n_most), slots_per_layer(n_slots_for(n_layer, chunk_bytes, byte_limit)),
      copies(copies) {
    if (slots_per_layer < n_most) {
        throw error(ACTQKV_ERR_MEMORY,
                    format("%.0f MiB of GPU memory hold %d chunks in each of %d layers, a step attends up to %d: at "
                           "least %.0f MiB are needed",
                           byte_limit / MIB, slots_per_layer, n_layer, n_most,
                           std::ceil(least_bytes(n_layer, chunk_bytes, n_most) / MIB)));
    }
    layers.resize(n_layer);
    for (layer & l : layers) {
        l.slots.resize(slots_per_layer);
    }
}

int32_t hot_chunks::slot_of(const layer & l, int32_t chunk) const {
    return (size_t) chunk < l.slot_of.size() ? l.slot_of[chunk] : -1;
}

double hot_chunks::heat_of(const layer & l, const slot & s) const {
    return s.chunk < 0 ? -1 : s.heat * faded(l.n_plans - s.warmed);
}

// Another plan has the slot's chunk.
void hot_chunks::warm(const layer & l, slot & s) const {
    s.heat = heat_of(l, s) + 1;
    s.warmed = l.n_plans;
}

// The n coldest slots that neither the current plan nor a guess since has named, or as many as there are; of equals the
// one that was named longer ago, then the lower one.
std::vector<int32_t> hot_chunks::coldest(const layer & l, uint64_t n) const {
    struct candidate {
        double heat;
        uint64_t named;
        int32_t at;
        bool operator<(const candidate & other) const {
            return heat != other.heat ? heat < other.heat : named != other.named ? named < other.named : at < other.at;
        }
    };
    std::vector<candidate> all;
    all.reserve(slots_per_layer);
    for (int32_t i = 0; i < slots_per_layer; i++) {
        const slot & s = l.slots[i];
        if (s.chunk < 0 || s.named < l.planned) {
            all.push_back({heat_of(l, s), s.named, i});
        }
    }
    n = std::min<uint64_t>(n, all.size());
    std::partial_sort(all.begin(), all.begin() + (int64_t) n, all.end());
    std::vector<int32_t> slots;
    for (uint64_t i = 0; i < n; i++) {
        slots.push_back(all[i].at);
    }
    return slots;
}

void hot_chunks::empty(layer & l, slot & s) {
    if (s.chunk >= 0) {
        l.slot_of[s.chunk] = -1;
        l.n_changes++;
        l.n_taken--;
        counts.n_wasted += s.guessed;
    }
    s = {};
}

void hot_chunks::bring(int il, int32_t chunk, int32_t at, bool guessed) {
    layer & l = layers[il];
    slot & s = l.slots[at];
    empty(l, s);
    if ((size_t) chunk >= l.slot_of.size()) {
        l.slot_of.resize(chunk + 1, -1);
    }
    copies.start(il, chunk, at); // where it throws, the slot is free
    l.slot_of[chunk] = at;
    l.n_changes++;
    l.n_taken++;
    s.chunk = chunk;
    s.named = l.number;
    s.warmed = l.n_plans;
    s.guessed = guessed;
    counts.bytes += chunk_bytes;
}

const std::vector<int32_t> & hot_chunks::plan(int il, const int32_t * chunks, int32_t n) {
    if (n > n_most) {
        throw error(ACTQKV_ERR_INTERNAL, format("a plan of %d chunks, the most are %d", n, n_most));
    }
    layer & l = layers[il];
    l.planned = ++l.number;
    l.n_plans++;
    found.assign(n, -1);
    size_t n_missing = 0;
    for (int32_t i = 0; i < n; i++) { // first what is there, so that nothing of it makes room
        found[i] = slot_of(l, chunks[i]);
        if (found[i] < 0) {
            n_missing++;
            continue;
        }
        slot & s = l.slots[found[i]];
        s.named = l.number;
        s.guessed = false;
        counts.n_hits++;
    }
    const std::vector<int32_t> room = n_missing > 0 ? coldest(l, n_missing) : std::vector<int32_t>();
    for (int32_t i = 0, next = 0; i < n; i++) {
        if (found[i] < 0) {
            found[i] = room[next++];
            bring(il, chunks[i], found[i], false);
            counts.n_misses++;
        }
        warm(l, l.slots[found[i]]);
    }
    return found;
}

void hot_chunks::prefetch(int il, const int32_t * chunks, int32_t n) {
    layer & l = layers[il];
    l.number++;
    std::vector<int32_t> missing;
    for (int32_t i = 0; i < n; i++) {
        const int32_t at = slot_of(l, chunks[i]);
        if (at < 0) {
            missing.push_back(chunks[i]);
        } else {
            l.slots[at].named = l.number;
        }
    }
    const std::vector<int32_t> room = missing.empty() ? missing : coldest(l, missing.size());
    for (size_t i = 0; i < room.size(); i++) {
        bring(il, missing[i], room[i], true);
        counts.n_prefetched++;
    }
}

void hot_chunks::fill(int il, int32_t first, int32_t last) {
    layer & l = layers[il];
    int32_t at = 0;
    for (int32_t chunk = first; chunk < last && l.n_taken < slots_per_layer; chunk++) {
        if (slot_of(l, chunk) >= 0) {
            continue;
        }
        while (l.slots[at].chunk >= 0) {
            at++;
        }
        bring(il, chunk, at, false);
    }
}

void hot_chunks::forget_from(int32_t n_closed) {
    for (layer & l : layers) {
        for (slot & s : l.slots) {
            if (s.chunk >= n_closed) {
                s.guessed = false; // whether the guess was right will not be known
                empty(l, s);
            }
        }
    }
}

} // namespace actqkv
