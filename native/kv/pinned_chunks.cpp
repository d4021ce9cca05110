#include "pinned_chunks.h"

#include "../error.h"

#include <unistd.h>

#include <algorithm>
#include <numeric>

namespace actqkv {
namespace {

constexpr int64_t LEAST_BYTES = 1 << 20, AHEAD = 8; // a stretch is at least a megabyte, and an eighth of what is pinned

} // namespace

pinned_chunks::pinned_chunks(const actqkv_cuda & cuda, const kv_store & store, int n_layer, int64_t n_chunks_max)
    : cuda(cuda), chunk_bytes((uint64_t) store.layout().chunk_bytes()), n_chunks_max(n_chunks_max), ends{0} {
    for (int il = 0; il < n_layer; il++) {
        const auto found = store.chunk_arrays(il);
        arrays.push_back(found[FILE_KEYS].data);
        arrays.push_back(found[FILE_VALUES].data);
    }
    // A copy must not reach from one pinned stretch into the next, and stretches must not share memory of the system's
    // granularity: they end where a chunk does and such memory too.
    const uint64_t granularity = (uint64_t) sysconf(_SC_PAGESIZE);
    n_granule = (int64_t) (std::lcm(chunk_bytes, granularity) / chunk_bytes);
    left = store.is_mapped(); // pinning would copy the file into memory
}

void pinned_chunks::reach(int64_t n) {
    if (left || !why.empty() || n <= ends.back()) {
        return;
    }
    const int64_t ahead = std::max<int64_t>(LEAST_BYTES / (int64_t) chunk_bytes + 1, ends.back() / AHEAD);
    const int64_t wanted = (std::max(n, ends.back() + ahead) + n_granule - 1) / n_granule * n_granule;
    const int64_t from = ends.back(), to = std::min(wanted, n_chunks_max);
    ends.push_back(to);
    for (n_last_arrays = 0; n_last_arrays < arrays.size(); n_last_arrays++) {
        const int32_t status =
            cuda.pin(arrays[n_last_arrays] + from * chunk_bytes, (uint64_t) (to - from) * chunk_bytes);
        if (status != 0) {
            why = format("chunks from %lld on are in ordinary memory, which is copied more slowly: %s",
                         (long long) from, cuda.error_text(status));
            return;
        }
    }
}

void pinned_chunks::leave() {
    for (size_t i = 1; i < ends.size(); i++) {
        for (size_t a = 0; a < n_arrays(i); a++) {
            cuda.unpin(arrays[a] + ends[i - 1] * chunk_bytes);
        }
    }
    ends.assign(1, 0);
    left = true;
}

uint64_t pinned_chunks::bytes() const {
    uint64_t total = 0;
    for (size_t i = 1; i < ends.size(); i++) {
        total += (uint64_t) (ends[i] - ends[i - 1]) * chunk_bytes * n_arrays(i);
    }
    return total;
}

} // namespace actqkv
