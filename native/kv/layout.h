// Where a token lies. Tokens are grouped in blocks: block 0 is the sinks, block b > 0 is chunk b - 1. Within a layer
// a block is [head][token][d], contiguous, so that one tile of one KV head is one sequential read.
#pragma once

#include <algorithm>
#include <cstdint>

namespace actqkv {

struct kv_layout {
    int32_t n_head_kv;
    int32_t d_head;
    int32_t n_sink;
    int32_t n_chunk_tokens;
    int32_t n_recent_blocks; // chunks that the ring of recent tokens holds

    int64_t block_of(int64_t token) const { return token < n_sink ? 0 : 1 + (token - n_sink) / n_chunk_tokens; }
    int64_t block_first(int64_t block) const { return block == 0 ? 0 : n_sink + (block - 1) * n_chunk_tokens; }
    int32_t block_tokens(int64_t block) const { return block == 0 ? n_sink : n_chunk_tokens; }

    int64_t token_stride() const { return (int64_t) n_head_kv * d_head; }
    int64_t head_stride(int64_t block) const { return (int64_t) block_tokens(block) * d_head; }

    // Elements from the start of the layer's array to block, and to block in the ring of recent tokens. The sinks
    // stay in the ring for ever, chunks take turns.
    int64_t block_offset(int64_t block) const { return block_first(block) * token_stride(); }
    int64_t recent_offset(int64_t block) const {
        return block == 0 ? 0 : block_first(1 + (block - 1) % n_recent_blocks) * token_stride();
    }

    int64_t recent_tokens() const { return n_sink + (int64_t) n_recent_blocks * n_chunk_tokens; }
    int64_t n_chunks_max(int64_t n_ctx) const { return std::max<int64_t>(0, (n_ctx - n_sink) / n_chunk_tokens); }
    int64_t padded_tokens(int64_t n_ctx) const { return n_sink + (n_chunks_max(n_ctx) + 1) * n_chunk_tokens; }
};

} // namespace actqkv
