// A row of keys or values as it is kept: f16, or blocks of 32 values with a scale of their own, laid out as ggml's
// q8_0 and q4_0 are, so that values compare with llama.cpp's.
//
//     q8_0  f16 s, i8 q[32]                      x_i = s q_i
//     q4_0  f16 s, u8 q[16]   i < 16:            x_i = s ((q_i & 15) - 8)      x_(i+16) = s ((q_i >> 4) - 8)
//
// A row of n values is ceil(n / 32) blocks; where n is no multiple of 32, the last one is filled up with zeros.
#pragma once

#include "half.h"
#include "kernels.h"

namespace actqkv {

constexpr int64_t BLOCK = 32; // values that share a scale
constexpr int64_t HALF_BLOCK = 16;
constexpr int64_t Q8_BYTES = 2 + BLOCK, Q4_BYTES = 2 + BLOCK / 2;

// Value e of a row.
static inline float row_value(int32_t type, const uint8_t * row, int64_t e) {
    const int64_t i = e % BLOCK;
    if (type == ACTQKV_KV_Q8_0) {
        const uint8_t * block = row + e / BLOCK * Q8_BYTES;
        return load_half(block) * (float) (int8_t) block[2 + i];
    }
    if (type == ACTQKV_KV_Q4_0) {
        const uint8_t * block = row + e / BLOCK * Q4_BYTES;
        const int pair = block[2 + i % HALF_BLOCK];
        return load_half(block) * (float) ((i < HALF_BLOCK ? pair & 15 : pair >> 4) - 8);
    }
    return load_half(row + e * 2);
}

// 32 values as a block of q4_0.
void store_q4_0(const float * x, uint8_t * block);

} // namespace actqkv
