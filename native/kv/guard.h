// Memory that files are mapped over, kept from ending the process.
//
// Where the system cannot bring a part of such memory, because the file was cut short or its disk failed, it sends
// SIGBUS to the thread that reads. Our handler then puts zeros in the place of the rest of the array and remembers that:
// the kernel that was reading goes on over zeros, and whoever called it throws its result away. Any other SIGBUS goes
// where it went before. A handler that somebody else sets later takes this away again, until the next file is mapped.
#pragma once

#include <cstdint>

namespace actqkv {

class guard {
public:
    // Guards n_bytes, whole granules of the system's, from `begin` on. Nothing where n_bytes is 0.
    guard(const void * begin, uint64_t n_bytes);
    guard(guard && other) noexcept : held(other.held) { other.held = nullptr; }
    guard & operator=(guard &&) = delete;
    ~guard();

    // Whether zeros stand for something that could not be read.
    bool failed() const;

    struct entry;

private:
    entry * held = nullptr;
};

} // namespace actqkv
