// The tokens of a session and how each was read, and the windows that follow from both.
//
// Windows are a function of the history alone, never of how it was cut into calls: a decode token is a window of its
// own; the other tokens are cut at absolute multiples of n_window and where the phase changes.
#pragma once

#include "actqkv.h"

#include <algorithm>
#include <vector>

namespace actqkv {

struct history {
    std::vector<int32_t> tokens;
    std::vector<int8_t> phases; // enum actqkv_phase

    int64_t size() const { return (int64_t) tokens.size(); }

    void append(const int32_t * more, int64_t n, int32_t phase) {
        phases.reserve(phases.size() + n); // both are as long as each other, also where memory runs out
        tokens.insert(tokens.end(), more, more + n);
        phases.insert(phases.end(), n, (int8_t) phase);
    }

    // Tokens [first, last) of another history, as they were read.
    void append(const history & other, int64_t first, int64_t last) {
        phases.reserve(phases.size() + last - first);
        tokens.insert(tokens.end(), other.tokens.begin() + first, other.tokens.begin() + last);
        phases.insert(phases.end(), other.phases.begin() + first, other.phases.begin() + last);
    }

    void truncate(int64_t n) {
        tokens.resize(n);
        phases.resize(n);
    }

    // Whether a window starts at token i, 0 <= i < size().
    bool starts_window(int64_t i, int32_t n_window) const {
        return i % n_window == 0 || phases[i] == ACTQKV_DECODE || phases[i - 1] != phases[i];
    }

    // Start of the window that token i is in.
    int64_t window_start(int64_t i, int32_t n_window) const {
        while (!starts_window(i, n_window)) {
            i--;
        }
        return i;
    }

    // End of the window that starts at token i.
    int64_t window_end(int64_t i, int32_t n_window) const {
        int64_t end = i + 1;
        while (end < size() && !starts_window(end, n_window)) {
            end++;
        }
        return end;
    }
};

} // namespace actqkv
