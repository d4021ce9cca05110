// Address space for an array whose final size is known but whose pages are only committed as they are written.
#pragma once

#include "../error.h"

#include <sys/mman.h>

#include <utility>

namespace actqkv {

template <typename T> class reservation {
public:
    reservation() = default;

    explicit reservation(uint64_t n) : n_bytes(n * sizeof(T)) {
        if (n_bytes == 0) {
            return;
        }
#ifdef MAP_NORESERVE
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#endif
        void * address = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (address == MAP_FAILED) {
            throw error(ACTQKV_ERR_MEMORY, format("cannot reserve %llu bytes", (unsigned long long) n_bytes));
        }
        array = static_cast<T *>(address);
#ifdef MADV_HUGEPAGE
        madvise(address, n_bytes, MADV_HUGEPAGE); // attention gathers tiles from all over: fewer TLB misses
#endif
    }

    reservation(reservation && other) noexcept { *this = std::move(other); }
    reservation & operator=(reservation && other) noexcept {
        std::swap(array, other.array);
        std::swap(n_bytes, other.n_bytes);
        return *this;
    }
    ~reservation() {
        if (array != nullptr) {
            munmap(array, n_bytes);
        }
    }

    T * data() { return array; }
    const T * data() const { return array; }
    uint64_t bytes() const { return n_bytes; }

private:
    T * array = nullptr;
    uint64_t n_bytes = 0;
};

} // namespace actqkv
