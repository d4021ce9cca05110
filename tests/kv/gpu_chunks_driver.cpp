// Brings random plans into slots of a GPU and reads every planned slot back: prints how many chunks were right, and what
// a GPU without room says. Arguments: the library, the seed.
#include "kv/gpu_chunks.h"

#include "error.h"

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <random>

namespace {

constexpr int N_LAYER = 3, N_CHUNKS = 60, N_SLOTS = 12, N_MOST = 5;
constexpr uint64_t CHUNK_BYTES = 512;

using bytes = std::vector<uint8_t>;

int run(const actqkv_cuda & cuda, unsigned seed) {
    std::mt19937 random(seed);
    bytes keys(N_LAYER * N_CHUNKS * CHUNK_BYTES / 2), values(keys.size());
    std::generate(keys.begin(), keys.end(), [&] { return (uint8_t) random(); });
    std::generate(values.begin(), values.end(), [&] { return (uint8_t) random(); });
    const auto offset = [](int il, int32_t chunk) { return ((size_t) il * N_CHUNKS + chunk) * (CHUNK_BYTES / 2); };
    actqkv_cuda_stream * compute = nullptr;
    if (cuda.open(0, &compute) != 0) {
        return 1;
    }
    int n_right = 0, n_wrong = 0;
    {
        actqkv::gpu_chunks gpu(cuda, 0, compute, N_LAYER, N_SLOTS, CHUNK_BYTES, [&](int il, int32_t chunk) {
            return actqkv::gpu_chunks::source{keys.data() + offset(il, chunk), values.data() + offset(il, chunk)};
        });
        actqkv::hot_chunks hot(N_LAYER, CHUNK_BYTES, N_LAYER * N_SLOTS * CHUNK_BYTES, N_MOST, gpu);
        for (int step = 0; step < 200; step++) {
            const int il = step % N_LAYER;
            std::vector<int32_t> chunks(N_CHUNKS);
            std::iota(chunks.begin(), chunks.end(), 0);
            std::shuffle(chunks.begin(), chunks.end(), random);
            const std::vector<int32_t> slots = hot.plan(il, chunks.data(), N_MOST);
            gpu.join();
            hot.prefetch((il + 1) % N_LAYER, chunks.data() + N_MOST, N_MOST);
            bytes found(CHUNK_BYTES);
            for (int i = 0; i < N_MOST; i++) {
                cuda.copy(compute, found.data(), gpu.keys(il, slots[i]), CHUNK_BYTES / 2);
                cuda.copy(compute, found.data() + CHUNK_BYTES / 2, gpu.values(il, slots[i]), CHUNK_BYTES / 2);
                cuda.wait(compute);
                const size_t at = offset(il, chunks[i]);
                const bool right = std::equal(found.begin(), found.begin() + CHUNK_BYTES / 2, &keys[at]) &&
                                   std::equal(found.begin() + CHUNK_BYTES / 2, found.end(), &values[at]);
                (right ? n_right : n_wrong)++;
            }
            gpu.finished_reading();
        }
    }
    std::cout << "right " << n_right << " wrong " << n_wrong << '\n';
    try {
        actqkv::gpu_chunks gpu(cuda, 0, compute, 64, 1 << 20, 1 << 20, {});
    } catch (const actqkv::error & failure) {
        std::cout << failure.what() << '\n';
    }
    cuda.close(compute);
    return 0;
}

} // namespace

int main(int, char ** arguments) {
    char reason[512];
    const actqkv_cuda * cuda = actqkv_cuda_load(arguments[1], reason, sizeof(reason));
    if (cuda == nullptr) {
        std::cerr << reason << '\n';
        return 1;
    }
    return run(*cuda, (unsigned) std::atoi(arguments[2]));
}
