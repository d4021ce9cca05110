#include "guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>

namespace actqkv {

// Of a list that only grows and is never freed, so that the handler can walk it at any time; one that nobody holds is
// used again.
struct guard::entry {
    std::atomic<uint32_t> changes{0}; // odd while begin and end change
    std::atomic<uintptr_t> begin{0}, end{0};
    std::atomic<bool> failed{false};
    bool taken = false; // under `lock`
    entry * next = nullptr;

    void set(uintptr_t from, uintptr_t to) {
        changes++;
        begin = from;
        end = to;
        changes++;
    }
};

namespace {

// A signal has one handler per process: the only state in native/ that no session owns.
std::mutex lock;
std::atomic<guard::entry *> first{nullptr};
struct sigaction before = {};
uintptr_t granule = 0;

guard::entry * entry_of(uintptr_t address) {
    for (guard::entry * e = first; e != nullptr; e = e->next) {
        const uint32_t changes = e->changes;
        const bool inside = e->begin <= address && address < e->end;
        if (inside && changes % 2 == 0 && e->changes == changes) {
            return e;
        }
    }
    return nullptr;
}

// Calls nothing that a handler may not call.
void on_fault(int signal, siginfo_t * info, void * context) {
    const uintptr_t address = (uintptr_t) info->si_addr;
    guard::entry * e = entry_of(address);
    if (e != nullptr) {
        void * from = (void *) (address / granule * granule);
        const int flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS;
        if (mmap(from, e->end - (uintptr_t) from, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED) {
            e->failed = true;
            return;
        }
    }
    if ((before.sa_flags & SA_SIGINFO) != 0) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        sigaction(signal, &before, nullptr); // what faulted runs again, and ends as it would have without us
    }
}

// Under `lock`.
void install() {
    struct sigaction found = {};
    sigaction(SIGBUS, nullptr, &found);
    if ((found.sa_flags & SA_SIGINFO) != 0 && found.sa_sigaction == on_fault) {
        return;
    }
    granule = sysconf(_SC_PAGESIZE);
    before = found;
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

} // namespace

guard::guard(const void * begin, uint64_t n_bytes) {
    if (n_bytes == 0) {
        return;
    }
    const std::lock_guard<std::mutex> alone(lock);
    install();
    for (held = first; held != nullptr && held->taken; held = held->next) {
    }
    if (held == nullptr) {
        held = std::make_unique<entry>().release();
        held->next = first;
        first = held;
    }
    held->taken = true;
    held->failed = false;
    held->set((uintptr_t) begin, (uintptr_t) begin + n_bytes);
}

guard::~guard() {
    if (held != nullptr) {
        held->set(0, 0);
        const std::lock_guard<std::mutex> alone(lock);
        held->taken = false;
    }
}

bool guard::failed() const { return held != nullptr && held->failed; }

} // namespace actqkv
