// See cuda_runtime.h.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace emulator {

place here;

namespace {

// What a test asks for: ACTQKV_EMULATOR_<name>, a number.
long wish(const char * name, long otherwise) {
    const char * text = getenv((std::string("ACTQKV_EMULATOR_") + name).c_str());
    return text != nullptr ? atol(text) : otherwise;
}

// Whether this is the call that FAIL_<what>=n asks to fail: the n-th of them, counted from 1, and all after it.
bool fails(const char * what, long & n_calls) {
    const long at = wish(what, 0);
    n_calls = at > 0 ? n_calls + 1 : 0;
    return at > 0 && n_calls >= at;
}
long n_mallocs, n_launches, n_pins, n_copies;

constexpr size_t STACK_BYTES = 128 << 10, MOST_SHARED = 227 << 10, MOST_STATIC = 48 << 10;
constexpr int WARP = 32;

struct warp {
    uint64_t values[2][WARP];
    int n_arrived = 0;
    uint64_t turn = 0;
};

enum waiting { NOTHING, BLOCK, LANES };

struct fiber {
    ucontext_t context; // to begin with; from then on jump, which saves no signals and is ten times faster
    jmp_buf jump;
    bool begun = false;
    place at;
    int index;
    waiting on = NOTHING;
    uint64_t turn; // of what it waits for
    bool ended = false;
};

std::vector<unsigned char *> stacks;
std::vector<fiber> fibers;
std::vector<warp> warps;
std::vector<unsigned char> shared;
ucontext_t scheduler;
jmp_buf scheduler_jump;
fiber * running;
const std::function<void()> * body;
int n_arrived, n_ended;
uint64_t block_turn;
cudaError_t failure;
std::mt19937 random(20250101);

void enter() {
    (*body)();
    running->ended = true;
    n_ended++;
    _longjmp(scheduler_jump, 1);
}

void yield() {
    if (_setjmp(running->jump) == 0) {
        _longjmp(scheduler_jump, 1);
    }
}

// Until it yields or ends.
void resume(fiber & f) {
    running = &f;
    here = f.at;
    f.on = NOTHING;
    if (_setjmp(scheduler_jump) != 0) {
        return;
    }
    if (f.begun) {
        _longjmp(f.jump, 1);
    }
    f.begun = true;
    swapcontext(&scheduler, &f.context);
}

bool ready(const fiber & f) {
    if (f.ended) {
        return false;
    }
    return f.on == NOTHING || (f.on == BLOCK ? block_turn : warps[f.index / WARP].turn) > f.turn;
}

void run_block(dim3 block, dim3 at, dim3 grid) {
    const int n = (int) (block.x * block.y * block.z);
    while ((int) stacks.size() < n) {
        stacks.push_back((unsigned char *) mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    fibers.assign(n, {});
    warps.assign((n + WARP - 1) / WARP, {});
    std::memset(shared.data(), 0xff, shared.size()); // NaN: what is read before it is written shows
    n_arrived = n_ended = 0;
    block_turn = 0;
    std::vector<int> order(n);
    for (int i = 0; i < n; i++) {
        fiber & f = fibers[i];
        f.index = order[i] = i;
        f.at = {dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y)), at, block, grid};
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks[i];
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    while (n_ended < n) {
        std::shuffle(order.begin(), order.end(), random);
        bool any = false;
        for (const int i : order) {
            fiber & f = fibers[i];
            if (!ready(f)) {
                continue;
            }
            any = true;
            resume(f);
            if (n_arrived > 0 && n_arrived == n - n_ended) { // who has ended is not waited for
                n_arrived = 0;
                block_turn++;
            }
        }
        if (!any) { // not all threads reach the same barrier, or not all lanes the same exchange
            failure = cudaErrorLaunchFailure;
            return;
        }
    }
}

} // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> & kernel) {
    if (fails("FAIL_LAUNCH", n_launches)) {
        failure = cudaErrorLaunchFailure;
        return;
    }
    if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.y > 65535 || block.x * block.y * block.z > 1024 ||
        shared_bytes > MOST_SHARED) {
        failure = cudaErrorInvalidValue;
        return;
    }
    body = &kernel;
    shared.resize(shared_bytes + 16);
    std::vector<unsigned> order(grid.x * grid.y);
    for (unsigned i = 0; i < order.size(); i++) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
        run_block(block, dim3(i % grid.x, i / grid.x), grid);
    }
}

cudaError_t launched() { return failure; }

int lane() { return running->index % WARP; }

unsigned char * shared_memory() { return (unsigned char *) (((uintptr_t) shared.data() + 15) / 16 * 16); }

void wait_block() {
    running->on = BLOCK;
    running->turn = block_turn;
    n_arrived++;
    yield();
}

const uint64_t * exchange(uint64_t mine) {
    warp & w = warps[running->index / WARP];
    const uint64_t turn = w.turn;
    w.values[turn % 2][lane()] = mine;
    if (++w.n_arrived == WARP) {
        w.n_arrived = 0;
        w.turn++;
    } else {
        running->on = LANES;
        running->turn = turn;
        yield();
    }
    return w.values[turn % 2]; // the next exchange but one writes here again, and waits for all lanes before
}

} // namespace emulator

void actqkv::cuda::emulated_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto half = [](uint32_t bits) {
        _Float16 x;
        const uint16_t low = (uint16_t) bits;
        std::memcpy(&x, &low, 2);
        return (float) x;
    };
    // A[row][k] by who holds it: register k / 8 * 2 + row / 8 of lane row % 8 * 4 + k % 8 / 2, half k % 2.
    uint64_t all_a[2][32], all_b[32];
    for (int i = 0; i < 2; i++) {
        std::memcpy(all_a[i], emulator::exchange((uint64_t) a[2 * i + 1] << 32 | a[2 * i]), sizeof(all_a[i]));
    }
    std::memcpy(all_b, emulator::exchange((uint64_t) b1 << 32 | b0), sizeof(all_b));
    const int lane = emulator::lane();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const uint64_t pair = all_a[k / 8][row % 8 * 4 + k % 8 / 2] >> row / 8 * 32;
            const uint64_t other = all_b[column * 4 + k % 8 / 2] >> k / 8 * 32;
            sum += half((uint32_t) (pair >> k % 2 * 16)) * half((uint32_t) (other >> k % 2 * 16));
        }
        c[i] += sum;
    }
}

// ---- the runtime's functions: all at once, in order

using emulator::fails, emulator::wish, emulator::n_mallocs, emulator::n_pins, emulator::n_copies;

namespace {

struct mapping {
    void * start;
    size_t bytes;
};
std::map<void *, mapping> mappings;
std::map<void *, size_t> pinned;

double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

} // namespace

struct emulated_stream {};
struct emulated_event {
    double at = 0;
};

const char * cudaGetErrorString(cudaError_t status) {
    return status == cudaSuccess                 ? "no error"
           : status == cudaErrorMemoryAllocation ? "out of memory"
           : status == cudaErrorInvalidValue     ? "invalid argument"
                                                 : "launch failure";
}
cudaError_t cudaGetLastError() {
    const cudaError_t last = emulator::failure;
    emulator::failure = cudaSuccess;
    return last;
}
cudaError_t cudaDriverGetVersion(int * version) { return *version = (int) wish("DRIVER", 13000), cudaSuccess; }
cudaError_t cudaGetDeviceCount(int * n) { return *n = (int) wish("DEVICES", 1), cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int) {
    *properties = {"emulated", (int) wish("MAJOR", 8), 0, 2};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaMemGetInfo(size_t * free, size_t * total) {
    *total = 1 << 30;
    *free = (size_t) wish("FREE", 1 << 30);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void ** memory, size_t bytes) {
    if (bytes > 1 << 30 || fails("FAIL_MALLOC", n_mallocs)) {
        return cudaErrorMemoryAllocation;
    }
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), rounded = (bytes + 15) / 16 * 16;
    const size_t usable = std::max<size_t>(1, (rounded + page - 1) / page) * page;
    unsigned char * start =
        (unsigned char *) mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
        return cudaErrorMemoryAllocation;
    }
    std::memset(start, 0xff, usable);
    mprotect(start + usable, page, PROT_NONE);
    *memory = start + usable - rounded;
    mappings[*memory] = {start, usable + page};
    return cudaSuccess;
}
cudaError_t cudaFree(void * memory) {
    const auto found = mappings.find(memory);
    if (found == mappings.end()) {
        return memory == nullptr ? cudaSuccess : cudaErrorInvalidValue;
    }
    munmap(found->second.start, found->second.bytes);
    mappings.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void ** memory, size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeHost(void * memory) { return cudaFree(memory); }
// As the driver: memory is pinned once, and ranges do not overlap at the system's granularity.
cudaError_t cudaHostRegister(void * memory, size_t bytes, unsigned) {
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), start = (uintptr_t) memory / page * page;
    const uintptr_t end = ((uintptr_t) memory + bytes + page - 1) / page * page;
    for (const auto & [other, n] : pinned) {
        const uintptr_t from = (uintptr_t) other / page * page, to = ((uintptr_t) other + n + page - 1) / page * page;
        if (from < end && start < to) {
            return cudaErrorInvalidValue;
        }
    }
    if (bytes == 0 || fails("FAIL_PIN", n_pins)) {
        return bytes == 0 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
    }
    pinned[memory] = bytes;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void * memory) {
    return pinned.erase(memory) == 1 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaHostGetDevicePointer(void ** there, void * memory, unsigned) { return *there = memory, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned) {
    return *stream = new emulated_stream, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulator::failure; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t * event) { return *event = new emulated_event, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return event->at = now_ms(), cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float * ms, cudaEvent_t from, cudaEvent_t to) {
    return *ms = (float) (to->at - from->at), cudaSuccess;
}
// As the driver: a range may not be pinned in part.
bool whole(const void * memory, size_t bytes) {
    const uintptr_t start = (uintptr_t) memory, end = start + bytes;
    for (const auto & [other, n] : pinned) {
        const uintptr_t from = (uintptr_t) other, to = from + n;
        if (from < end && start < to && (start < from || to < end)) {
            return false;
        }
    }
    return true;
}

cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    if (!whole(to, bytes) || !whole(from, bytes)) {
        return cudaErrorInvalidValue;
    }
    if (fails("FAIL_COPY", n_copies)) {
        return cudaErrorLaunchFailure;
    }
    return std::memmove(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void * to, size_t to_pitch, const void * from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    if (width > to_pitch || width > from_pitch) {
        return cudaErrorInvalidValue;
    }
    for (size_t i = 0; i < height; i++) {
        const cudaError_t status =
            cudaMemcpyAsync((char *) to + i * to_pitch, (const char *) from + i * from_pitch, width, kind, stream);
        if (status != cudaSuccess) {
            return status;
        }
    }
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void * memory, int byte, size_t bytes, cudaStream_t) {
    return std::memset(memory, byte, bytes), cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int value) {
    return value <= (int) emulator::MOST_SHARED ? cudaSuccess : cudaErrorInvalidValue;
}
