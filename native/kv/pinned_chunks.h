// Memory of closed chunks, pinned as it fills, so that copies to a GPU run at full speed and beside everything else.
#pragma once

#include "../kernels/cuda/kernels_cuda.h"
#include "store.h"

#include <string>
#include <vector>

namespace actqkv {

class pinned_chunks {
public:
    pinned_chunks(const actqkv_cuda & cuda, const kv_store & store, int n_layer, int64_t n_chunks_max);
    ~pinned_chunks() { leave(); }
    pinned_chunks(const pinned_chunks &) = delete;
    pinned_chunks & operator=(const pinned_chunks &) = delete;

    // Pins keys and values of at least the first n chunks, and some ahead. Where the system refuses, problem() says why,
    // and chunks stay in ordinary memory from there on: copies are slower.
    void reach(int64_t n);
    // Unpins all, for good: before other memory is mapped in its place.
    void leave();

    // Whether the first n chunks are pinned, so that kernels may read them.
    bool has(int64_t n) const { return !left && why.empty() && n <= ends.back(); }

    uint64_t bytes() const;
    const std::string & problem() const { return why; }

private:
    // how many of the arrays are pinned from ends[i - 1] to ends[i]
    size_t n_arrays(size_t i) const { return i + 1 < ends.size() ? arrays.size() : n_last_arrays; }

    const actqkv_cuda & cuda;
    std::vector<uint8_t *> arrays; // of each layer: keys, values
    uint64_t chunk_bytes;          // in one of them
    int64_t n_chunks_max, n_granule;
    std::vector<int64_t> ends; // pinned so far: chunks from one end to the next, in every array
    size_t n_last_arrays = 0;  // of the last stretch: fewer than all where the system refused
    bool left = false;
    std::string why;
};

} // namespace actqkv
