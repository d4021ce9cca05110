// Points of the history to which a session can return without reading again. A checkpoint holds what a window
// overwrites: layer memories and the recent state. K and V stay where they are.
#pragma once

#include "../retrieval/planner.h"

#include <algorithm>
#include <vector>

namespace actqkv {

struct checkpoint {
    int64_t n_past = 0;
    int64_t n_closed = 0;
    bool pinned = false; // asked for by the caller
    std::vector<layer_memory> memory;
    recent_state recent;
};

constexpr size_t N_CHECKPOINTS = 8;
constexpr size_t N_PINNED_CHECKPOINTS = 4;

class checkpoints {
public:
    void add(checkpoint && c) {
        const auto at = std::lower_bound(all.begin(), all.end(), c.n_past,
                                         [](const checkpoint & x, int64_t n) { return x.n_past < n; });
        if (at != all.end() && at->n_past == c.n_past) {
            c.pinned = c.pinned || at->pinned;
            *at = std::move(c);
        } else {
            all.insert(at, std::move(c));
        }
        thin();
    }

    // A pin moves to the last checkpoint that stays: the caller will come back to that region.
    void forget_after(int64_t n_past) {
        bool pinned = false;
        while (!all.empty() && all.back().n_past > n_past) {
            pinned = pinned || all.back().pinned;
            all.pop_back();
        }
        if (!all.empty()) {
            all.back().pinned = all.back().pinned || pinned;
        }
    }

    void clear() { all.clear(); }

    const std::vector<checkpoint> & list() const { return all; }

private:
    // Keeps the last two, the newest pinned ones, and the others the denser the nearer to the end.
    void thin() {
        size_t n_pinned = 0;
        for (size_t i = all.size(); i-- > 0;) {
            n_pinned += all[i].pinned;
            all[i].pinned = all[i].pinned && n_pinned <= N_PINNED_CHECKPOINTS;
        }
        if (all.size() <= N_CHECKPOINTS) {
            return;
        }
        const double end = (double) all.back().n_past;
        size_t victim = 0;
        double least = 1e300;
        for (size_t i = 0; i + 2 < all.size(); i++) {
            const double before = i == 0 ? 0.0 : (double) all[i - 1].n_past;
            const double worth = (all[i + 1].n_past - before) / (end - all[i].n_past + 1.0);
            if (!all[i].pinned && worth < least) {
                least = worth;
                victim = i;
            }
        }
        all.erase(all.begin() + victim);
    }

    std::vector<checkpoint> all; // by n_past
};

} // namespace actqkv
