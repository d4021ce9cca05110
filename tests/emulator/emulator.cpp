// See cuda_runtime.h.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef __linux__
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
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

// Of shared memory: what every card from Ampere on has (8.6 and 8.9 have the least), and what a kernel gets unasked.
constexpr size_t STACK_BYTES = 128 << 10, MOST_SHARED = 99 << 10, MOST_UNASKED = 48 << 10;
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

#ifdef __linux__
thread_local bool there; // so that there is a block of thread-local memory

// Fills the __shared__ variables of this thread, all that is thread-local in this library, with NaN.
int poison(dl_phdr_info * library, size_t, void *) {
    const auto has = [&](const ElfW(Phdr) & part) {
        const uintptr_t start = library->dlpi_addr + part.p_vaddr, at = (uintptr_t) &n_launches;
        return part.p_type == PT_LOAD && start <= at && at < start + part.p_memsz;
    };
    const ElfW(Phdr) * parts = library->dlpi_phdr, *end = parts + library->dlpi_phnum;
    if (std::none_of(parts, end, has)) {
        return 0;
    }
    const auto shared_part = std::find_if(parts, end, [](const ElfW(Phdr) & part) { return part.p_type == PT_TLS; });
    if (shared_part != end && library->dlpi_tls_data != nullptr) {
        std::memset(library->dlpi_tls_data, 0xff, shared_part->p_memsz);
    }
    return 1;
}
#endif

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
#ifdef __linux__
    there = true;
    dl_iterate_phdr(poison, nullptr);
#endif
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

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> & kernel) {
    body = &kernel;
    shared.resize(shared_bytes + 16);
    std::vector<unsigned> order((size_t) grid.x * grid.y);
    for (unsigned i = 0; i < order.size(); i++) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
        run_block(block, dim3(i % grid.x, i / grid.x), grid);
    }
}

} // namespace

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

// ---- streams

namespace {

struct range {
    const unsigned char * start;
    size_t bytes;

    bool meets(const range & other) const { return start < other.start + other.bytes && other.start < start + bytes; }
};

struct moment {
    bool passed = false;
    double at = 0;
};

struct operation {
    std::function<void()> run;
    std::shared_ptr<moment> after; // NULL: at once
    std::vector<range> copied;     // what a copy reads and writes; of a kernel nobody knows
    bool takes_long = false;       // a kernel, or what comes after another stream
};

double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

} // namespace

struct emulated_stream {
    std::deque<operation> queue;
};
struct emulated_event {
    std::shared_ptr<moment> last; // NULL: never recorded
};

namespace {

std::recursive_mutex door; // one thread at a time in all of this
using entered = std::lock_guard<std::recursive_mutex>;

std::set<emulated_stream *> streams;
std::map<const void *, size_t> allowed; // bytes of shared memory that were asked for, by kernel
cudaError_t last_error;                 // of the calls themselves

cudaError_t said(cudaError_t status) {
    last_error = status != cudaSuccess ? status : last_error;
    return status;
}

cudaError_t queue(cudaStream_t stream, operation && next) {
    const entered lock(door);
    stream->queue.push_back(std::move(next));
    return cudaSuccess;
}

// The next operation of a stream that is drawn; false: there is none.
bool step() {
    std::vector<emulated_stream *> ready;
    for (emulated_stream * s : streams) {
        if (!s->queue.empty() && (s->queue.front().after == nullptr || s->queue.front().after->passed)) {
            ready.push_back(s);
        }
    }
    if (ready.empty()) {
        return false;
    }
    std::deque<operation> & from = ready[emulator::random() % ready.size()]->queue;
    const operation next = std::move(from.front());
    from.pop_front();
    next.run();
    return true;
}

template <typename Done> cudaError_t run_until(Done && done) {
    const entered lock(door);
    while (!done() && step()) {
    }
    return emulator::failure;
}

void run_all() {
    run_until([] { return false; });
}

} // namespace

cudaError_t emulator::launch(const cudaLaunchConfig_t & config, const void * kernel, std::function<void()> body) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const size_t bytes = config.dynamicSmemBytes;
    const entered lock(door);
    if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.x > INT32_MAX || grid.y > 65535 ||
        block.x * block.y * block.z == 0 || (size_t) block.x * block.y * block.z > 1024 || block.z > 64 ||
        bytes > std::max(MOST_UNASKED, allowed[kernel])) {
        return said(cudaErrorInvalidValue);
    }
    const bool broken = fails("FAIL_LAUNCH", n_launches); // as a card does, it says so when somebody waits
    return queue(config.stream, {[=, body = std::move(body)] {
                                     if (broken) {
                                         failure = cudaErrorLaunchFailure;
                                     } else if (failure == cudaSuccess) { // nothing runs behind a kernel that failed
                                         run_grid(grid, block, bytes, body);
                                     }
                                 },
                                 nullptr,
                                 {},
                                 true});
}

// ---- the runtime's functions

using emulator::fails, emulator::is_known, emulator::wish, emulator::n_mallocs, emulator::n_pins, emulator::n_copies;

namespace {

struct mapping {
    void * start;
    size_t bytes;
};
std::map<void *, mapping> mappings;
std::map<void *, size_t> pinned;
std::atomic<int64_t> n_waits; // of the host

} // namespace

extern "C" int64_t actqkv_emulator_n_waits() { return n_waits; }

bool emulator::is_known(const void * memory, size_t bytes) {
    const entered lock(door);
    const unsigned char *start = (const unsigned char *) memory, *end = start + bytes;
    const auto mapped = std::find_if(mappings.begin(), mappings.end(), [&](const auto & one) {
        const unsigned char * from = (const unsigned char *) one.second.start;
        return from <= start && end <= from + one.second.bytes;
    });
    return mapped != mappings.end() || std::any_of(pinned.begin(), pinned.end(), [&](const auto & one) {
               const unsigned char * from = (const unsigned char *) one.first;
               return from <= start && end <= from + one.second;
           });
}

const char * cudaGetErrorString(cudaError_t status) {
    return status == cudaSuccess                 ? "no error"
           : status == cudaErrorMemoryAllocation ? "out of memory"
           : status == cudaErrorInvalidValue     ? "invalid argument"
                                                 : "launch failure";
}
cudaError_t cudaGetLastError() {
    const cudaError_t last = last_error != cudaSuccess ? last_error : emulator::failure;
    last_error = emulator::failure = cudaSuccess;
    return last;
}
cudaError_t cudaDriverGetVersion(int * version) { return *version = (int) wish("DRIVER", 13000), cudaSuccess; }
cudaError_t cudaGetDeviceCount(int * n) { return *n = (int) wish("DEVICES", 1), cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int) {
    *properties = {"emulated", (int) wish("MAJOR", 8), 0, 2};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : said(cudaErrorInvalidValue); }
cudaError_t cudaMemGetInfo(size_t * free, size_t * total) {
    *total = 1 << 30;
    *free = (size_t) wish("FREE", 1 << 30);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void ** memory, size_t bytes) {
    const entered lock(door);
    if (bytes > 1 << 30 || fails("FAIL_MALLOC", n_mallocs)) {
        return said(cudaErrorMemoryAllocation);
    }
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), rounded = (bytes + 15) / 16 * 16;
    const size_t usable = std::max<size_t>(1, (rounded + page - 1) / page) * page;
    unsigned char * start =
        (unsigned char *) mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
        return said(cudaErrorMemoryAllocation);
    }
    std::memset(start, 0xff, usable);
    mprotect(start + usable, page, PROT_NONE);
    *memory = start + usable - rounded;
    mappings[*memory] = {start, usable + page};
    return cudaSuccess;
}
cudaError_t cudaFree(void * memory) {
    const entered lock(door);
    run_all(); // the driver waits as well
    const auto found = mappings.find(memory);
    if (found == mappings.end()) {
        return memory == nullptr ? cudaSuccess : said(cudaErrorInvalidValue);
    }
    munmap(found->second.start, found->second.bytes);
    mappings.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void ** memory, size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeHost(void * memory) {
    return memory == nullptr ? said(cudaErrorInvalidValue) : cudaFree(memory); // nothing is said of NULL
}
// As the driver: memory is pinned once, and ranges do not overlap at the system's granularity.
cudaError_t cudaHostRegister(void * memory, size_t bytes, unsigned) {
    const entered lock(door);
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), start = (uintptr_t) memory / page * page;
    const uintptr_t end = ((uintptr_t) memory + bytes + page - 1) / page * page;
    for (const auto & [other, n] : pinned) {
        const uintptr_t from = (uintptr_t) other / page * page, to = ((uintptr_t) other + n + page - 1) / page * page;
        if (from < end && start < to) {
            return said(cudaErrorInvalidValue);
        }
    }
    if (bytes == 0 || fails("FAIL_PIN", n_pins)) {
        return said(bytes == 0 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation);
    }
    pinned[memory] = bytes;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void * memory) {
    const entered lock(door);
    const auto found = pinned.find(memory);
    if (found == pinned.end()) {
        return said(cudaErrorInvalidValue);
    }
    const range all = {(const unsigned char *) memory, found->second};
    const auto met = [&](const range & one) { return one.meets(all); };
    for (const emulated_stream * s : streams) {
        for (const operation & one : s->queue) {
            if (std::any_of(one.copied.begin(), one.copied.end(), met)) {
                fprintf(stderr, "emulator: memory is unpinned while a copy of it is queued\n");
                abort();
            }
        }
    }
    pinned.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void ** there, void * memory, unsigned) { return *there = memory, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned) {
    const entered lock(door);
    streams.insert(*stream = new emulated_stream);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const entered lock(door);
    cudaStreamSynchronize(stream);
    streams.erase(stream);
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    n_waits++;
    return run_until([&] { return stream->queue.empty(); });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return queue(stream, {[] {}, event->last, {}, true});
}
cudaError_t cudaEventCreate(cudaEvent_t * event) { return *event = new emulated_event, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const auto now = event->last = std::make_shared<moment>();
    return queue(stream, {[now] { *now = {true, now_ms()}; }, nullptr, {}});
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    n_waits++;
    return run_until([&] { return event->last == nullptr || event->last->passed; });
}
cudaError_t cudaEventElapsedTime(float * ms, cudaEvent_t from, cudaEvent_t to) {
    for (const emulated_event * event : {from, to}) {
        if (event->last == nullptr || !event->last->passed) {
            return said(cudaErrorInvalidValue);
        }
    }
    return *ms = (float) (to->last->at - from->last->at), cudaSuccess;
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

cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy2DAsync(void * to, size_t to_pitch, const void * from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    const entered lock(door);
    const size_t to_bytes = width * height > 0 ? (height - 1) * to_pitch + width : 0;
    const size_t from_bytes = width * height > 0 ? (height - 1) * from_pitch + width : 0;
    const bool to_known = is_known(to, to_bytes), from_known = is_known(from, from_bytes);
    if (width > to_pitch || width > from_pitch || !whole(to, to_bytes) || !whole(from, from_bytes) ||
        (kind == cudaMemcpyHostToDevice && !to_known)) {
        return said(cudaErrorInvalidValue);
    }
    if (fails("FAIL_COPY", n_copies)) {
        return said(cudaErrorLaunchFailure);
    }
    const auto takes_long = [](const operation & one) { return one.takes_long; };
    n_waits += (!to_known || !from_known) && std::any_of(stream->queue.begin(), stream->queue.end(), takes_long);
    const auto copy = [=](const unsigned char * start) {
        for (size_t i = 0; i < height; i++) {
            std::memmove((unsigned char *) to + i * to_pitch, start + i * from_pitch, width);
        }
    };
    const unsigned char * start = (const unsigned char *) from;
    if (!from_known && emulator::random() % 2 == 0) { // taken at once; else late
        const std::vector<unsigned char> taken(start, start + from_bytes);
        return queue(stream, {[=] { copy(taken.data()); }, nullptr, {{(unsigned char *) to, to_bytes}}});
    }
    return queue(stream,
                 {[=] { copy(start); }, nullptr, {{start, from_bytes}, {(const unsigned char *) to, to_bytes}}});
}
cudaError_t cudaMemsetAsync(void * memory, int byte, size_t bytes, cudaStream_t stream) {
    const entered lock(door);
    if (!is_known(memory, bytes)) {
        return said(cudaErrorInvalidValue);
    }
    return queue(stream, {[=] { std::memset(memory, byte, bytes); }, nullptr, {}});
}
cudaError_t cudaFuncSetAttribute(const void * kernel, cudaFuncAttribute, int value) {
    const entered lock(door);
    if (value > (int) emulator::MOST_SHARED) {
        return said(cudaErrorInvalidValue);
    }
    allowed[kernel] = (size_t) value;
    return cudaSuccess;
}
