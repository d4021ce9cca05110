// Where a token lies. Tokens are grouped in blocks: block 0 is the sinks, block b > 0 is chunk b - 1. Within a layer
// a block is [head][token][d], contiguous, so that one tile of one KV head is one sequential read.
//
// The sinks and the newest chunks are f16, in a ring; what has left local is in an array of closed chunks.
#pragma once

#include "../kernels/kernels.h"

#include <algorithm>
#include <cstdint>

namespace actqkv {

// Tokens of the longest stretches that closed chunks are indexed by (stretches.h), and chunks.
constexpr int64_t STRETCH_TOKENS = 65536;
inline int64_t stretch_chunks(int32_t n_chunk_tokens) { return std::max<int64_t>(1, STRETCH_TOKENS / n_chunk_tokens); }

struct kv_layout {
    int32_t n_head_kv;
    int32_t d_head;
    int32_t n_sink;
    int32_t n_chunk_tokens;
    int32_t n_recent_blocks; // chunks that the ring of recent tokens holds
    int32_t kv_type;         // enum actqkv_kv_type of closed chunks

    int64_t block_of(int64_t token) const { return token < n_sink ? 0 : 1 + (token - n_sink) / n_chunk_tokens; }
    int64_t block_first(int64_t block) const { return block == 0 ? 0 : n_sink + (block - 1) * n_chunk_tokens; }
    int32_t block_tokens(int64_t block) const { return block == 0 ? n_sink : n_chunk_tokens; }

    int64_t token_stride() const { return (int64_t) n_head_kv * d_head; }
    int64_t head_stride(int64_t block) const { return (int64_t) block_tokens(block) * d_head; }

    // Elements from the start of the ring to block. The sinks stay in the ring for ever, chunks take turns.
    int64_t recent_offset(int64_t block) const {
        return block == 0 ? 0 : block_first(1 + (block - 1) % n_recent_blocks) * token_stride();
    }

    int64_t recent_tokens() const { return n_sink + (int64_t) n_recent_blocks * n_chunk_tokens; }
    // Closed chunks, one key or value after another.
    int64_t row_bytes() const { return actqkv_row_bytes(kv_type, d_head); }
    int64_t tile_bytes() const { return n_chunk_tokens * row_bytes(); } // of one KV head
    int64_t chunk_bytes() const { return n_head_kv * tile_bytes(); }
    int64_t n_chunks_max(int64_t n_ctx) const { return std::max<int64_t>(0, (n_ctx - n_sink) / n_chunk_tokens); }

    // Blocks that hold the tokens behind the sinks and n_closed chunks, of n_tokens in all.
    int64_t n_open_blocks(int64_t n_tokens, int64_t n_closed) const {
        return n_tokens <= block_first(n_closed + 1) ? 0 : block_of(n_tokens - 1) - n_closed;
    }
};

} // namespace actqkv
