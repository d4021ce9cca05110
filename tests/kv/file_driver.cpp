// Maps a KV file over memory where the system refuses to, and tells what is in that memory afterwards.
#include "kv/file.h"

#include "error.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>

// In place of the C library's: no file can be mapped, and what lay there is gone by then, as on file systems that have no
// mmap.
extern "C" void * mmap(void * at, size_t n, int prot, int flags, int fd, off_t offset) noexcept {
    if (fd >= 0) {
        munmap(at, n);
        errno = ENODEV;
        return MAP_FAILED;
    }
    return (void *) syscall(SYS_mmap, at, n, prot, flags, fd, offset);
}

int main(int, char ** argv) {
    using namespace actqkv;
    const uint64_t n_bytes = kv_file::map_granule();
    file_header header = {};
    header.n_tokens = header.n_chunks = header.n_layer = header.checkpoint_tokens = 1;
    header.params.method.n_chunk_tokens = 1;
    header.slot_bytes = 4096;
    header.chunk_bytes[FILE_KEYS] = n_bytes;
    const int32_t token = 0;
    const int8_t phase = 0;
    kv_file file = kv_file::create(argv[1], header, &token, &phase, nullptr);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    uint8_t * memory = (uint8_t *) mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    std::fill_n(memory, n_bytes, 7);
    const chunk_array keys = {memory, n_bytes, 1, 0};
    file.write_chunks(0, FILE_KEYS, 0, 1, keys);
    try {
        file.map(0, FILE_KEYS, 0, n_bytes, keys);
        std::cout << "mapped";
    } catch (const error & e) {
        std::cout << e.status;
    }
    std::cout << ' ' << std::count(memory, memory + n_bytes, 7) << ' ' << n_bytes << '\n';
}
