// Numbers and arrays as bytes, for states and KV files, and their checksum. Little-endian, as all machines we run on.
#pragma once

#include "../error.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace actqkv {

inline uint64_t mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    return hash ^ (hash >> 29);
}

// Of words of 8 bytes, then of the bytes that are left.
inline uint64_t checksum(const void * data, uint64_t size) {
    const uint8_t * bytes = (const uint8_t *) data;
    uint64_t hash = size;
    uint64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t word;
        memcpy(&word, bytes + i, 8);
        hash = mix(hash, word);
    }
    for (; i < size; i++) {
        hash = mix(hash, bytes[i]);
    }
    return hash;
}

// Counts bytes when `to` is NULL, else writes them.
struct writer {
    uint8_t * to;
    uint64_t used = 0;

    void raw(const void * data, uint64_t bytes) {
        if (to != nullptr && bytes > 0) {
            memcpy(to + used, data, bytes);
        }
        used += bytes;
    }
    template <typename T> void value(const T & x) { raw(&x, sizeof(T)); }
    template <typename T> void array(const std::vector<T> & x) {
        value((uint64_t) x.size());
        raw(x.data(), x.size() * sizeof(T));
    }
    // As much as an array of n values takes.
    template <typename T> void count(uint64_t n) { used += sizeof(n) + n * sizeof(T); }
};

// Throws ACTQKV_ERR_STATE rather than read past `size`, or take memory for more than there is.
struct reader {
    const uint8_t * from;
    uint64_t size;
    uint64_t used = 0;

    void require(uint64_t bytes) const {
        if (bytes > size - used) {
            throw error(ACTQKV_ERR_STATE, format("state ends after %llu bytes, expected %llu more",
                                                 (unsigned long long) size, (unsigned long long) bytes));
        }
    }
    void raw(void * data, uint64_t bytes) {
        require(bytes);
        if (bytes > 0) {
            memcpy(data, from + used, bytes);
        }
        used += bytes;
    }
    template <typename T> T value() {
        T x;
        raw(&x, sizeof(T));
        return x;
    }
    // Of `expected` elements, or of none where `or_empty`.
    template <typename T> void array(std::vector<T> & x, uint64_t expected, bool or_empty = false) {
        const uint64_t n = value<uint64_t>();
        if (n != expected && !(or_empty && n == 0)) {
            throw error(ACTQKV_ERR_STATE, format("state holds an array of %llu, expected %llu", (unsigned long long) n,
                                                 (unsigned long long) expected));
        }
        require(n * sizeof(T)); // before memory is taken for it
        x.resize(n);
        raw(x.data(), n * sizeof(T));
    }
    template <typename T> void array_up_to(std::vector<T> & x, uint64_t most) {
        uint64_t n = 0;
        if (size - used >= sizeof(n)) {
            memcpy(&n, from + used, sizeof(n));
        }
        array(x, std::min(n, most));
    }
};

} // namespace actqkv
