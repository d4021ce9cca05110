#include "file.h"

#include "bytes.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <limits>

namespace actqkv {
namespace {

constexpr uint64_t MAGIC = 0x00454C4946564B41;      // "AKVFILE\0"
constexpr uint64_t SLOT_MAGIC = 0x00544F4C53564B41; // "AKVSLOT\0"
constexpr uint32_t VERSION = 3;
constexpr uint64_t ALIGN = 65536; // the largest page size of the systems we run on
constexpr uint64_t HEADER_BYTES = 4096;

struct slot_header {
    uint64_t magic;
    uint64_t sequence;
    int64_t n_done;
    int64_t n_closed;
    uint64_t table_checksum;
    uint32_t complete;
    uint32_t zero;
    uint64_t payload_bytes;
};

[[noreturn]] void fail_os(const char * what, const std::string & path, int code) {
    throw error(ACTQKV_ERR_FILE, format("cannot %s %s: %s", what, path.c_str(), strerror(code)));
}

[[noreturn]] void fail_damaged(const std::string & path, const std::string & what) {
    throw error(ACTQKV_ERR_STATE, format("%s is damaged: %s", path.c_str(), what.c_str()));
}

uint64_t aligned(uint64_t offset) { return (offset + ALIGN - 1) / ALIGN * ALIGN; }

uint32_t folded(uint64_t hash) { return (uint32_t) (hash ^ (hash >> 32)); }

// The pieces of one chunk, one after another.
void gather(const chunk_array & from, int64_t chunk, uint8_t * to) {
    const uint64_t piece = from.chunk_bytes / from.n_rows;
    for (int64_t i = 0; i < from.n_rows; i++) {
        memcpy(to + i * piece, from.data + i * from.row_stride + chunk * piece, piece);
    }
}

std::string folder_of(const std::string & path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// The file that is to become `path`, locked: a new one, or what a killed process left under the name. Not put_in_place's
// second name of a file that is whole.
int open_temporary(const std::string & temporary, const std::string & path) {
    if (access(path.c_str(), F_OK) == 0) {
        throw error(ACTQKV_ERR_FILE, format("%s exists already", path.c_str()));
    }
    const int fd = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) {
        fail_os("make", path, errno);
    }
    struct stat found = {};
    uint64_t magic = 0; // stays that where the file is empty
    const bool locked = flock(fd, LOCK_EX | LOCK_NB) == 0;
    const bool ours = fstat(fd, &found) == 0 && S_ISREG(found.st_mode) && pread(fd, &magic, sizeof(magic), 0) >= 0 &&
                      (magic == 0 || magic == MAGIC);
    if (locked && ours && found.st_nlink == 1) {
        return fd;
    }
    close(fd);
    if (locked && ours) {
        unlink(temporary.c_str());
        return open_temporary(temporary, path);
    }
    if (!locked) {
        throw error(ACTQKV_ERR_FILE, format("%s is being made by another process", path.c_str()));
    }
    throw error(ACTQKV_ERR_FILE,
                format("%s is in the way, and not what a reading that was cut short left: move it", temporary.c_str()));
}

// Gives `from` the name `to`, where nothing has that name.
void put_in_place(const std::string & from, const std::string & to) {
    if (link(from.c_str(), to.c_str()) == 0) {
        unlink(from.c_str());
    } else if (errno == EEXIST || access(to.c_str(), F_OK) == 0) {
        unlink(from.c_str());
        throw error(ACTQKV_ERR_FILE, format("%s exists already", to.c_str()));
    } else if (rename(from.c_str(), to.c_str()) != 0) { // a file system without hard links
        const int code = errno;
        unlink(from.c_str());
        fail_os("make", to, code);
    }
    const int folder = ::open(folder_of(to).c_str(), O_RDONLY | O_CLOEXEC);
    if (folder >= 0) {
        fsync(folder);
        close(folder);
    }
}

} // namespace

kv_file::kv_file(kv_file && other) noexcept
    : path(std::move(other.path)), fd(other.fd), head(other.head), layout(other.layout),
      all_tokens(std::move(other.all_tokens)), all_phases(std::move(other.all_phases)), table(std::move(other.table)),
      current(std::move(other.current)), sequence(other.sequence) {
    other.fd = -1;
}

kv_file::~kv_file() {
    end_writing();
    if (fd >= 0) {
        close(fd);
    }
}

// ---- where things lie

kv_file::offsets kv_file::layout_of(const file_header & h, const std::string & path) {
    const auto times = [&](uint64_t a, uint64_t b) { // so far below 2^64 that sums of them cannot wrap either
        uint64_t product = 0;
        if (__builtin_mul_overflow(a, b, &product) || product > (1ull << 60)) {
            fail_damaged(path, "its sizes are beyond all measure");
        }
        return product;
    };
    offsets at;
    at.tokens = aligned(HEADER_BYTES);
    at.section = aligned(at.tokens + times(h.n_tokens, 5) + 8);
    at.slots = aligned(at.section + times(h.section_bytes, 1) + 8);
    at.table = at.slots + 2 * aligned(times(h.slot_bytes, 1));
    at.arrays = aligned(at.table + times(times(h.n_chunks, h.n_layer), N_FILE_ARRAYS * sizeof(uint32_t)));
    uint64_t layer = 0;
    for (int a = 0; a < N_FILE_ARRAYS; a++) {
        layer += aligned(times(n_kept(a, h.n_chunks, h.params.method.n_chunk_tokens), h.chunk_bytes[a]));
    }
    at.end = at.arrays + times(h.n_layer, layer);
    return at;
}

uint64_t kv_file::array_bytes(int array) const {
    return aligned(n_kept(array, head.n_chunks, head.params.method.n_chunk_tokens) * head.chunk_bytes[array]);
}

uint64_t kv_file::array_offset(int il, int array) const {
    uint64_t layer = 0, before = 0;
    for (int a = 0; a < N_FILE_ARRAYS; a++) {
        layer += array_bytes(a);
        before += a < array ? array_bytes(a) : 0;
    }
    return layout.arrays + il * layer + before;
}

void kv_file::read_at(uint64_t offset, void * data, uint64_t n) const {
    for (uint64_t done = 0; done < n;) {
        const ssize_t got = pread(fd, (uint8_t *) data + done, n - done, (off_t) (offset + done));
        if (got == 0) {
            fail_damaged(path, format("it ends at byte %llu", (unsigned long long) (offset + done)));
        }
        if (got < 0 && errno != EINTR) {
            fail_os("read", path, errno);
        }
        done += got > 0 ? got : 0;
    }
}

void kv_file::write_at(uint64_t offset, const void * data, uint64_t n) const {
    for (uint64_t done = 0; done < n;) {
        const ssize_t put = pwrite(fd, (const uint8_t *) data + done, n - done, (off_t) (offset + done));
        if (put < 0 && errno != EINTR) {
            fail_os("write to", path, errno);
        }
        done += put > 0 ? put : 0;
    }
}

// ---- create and open

kv_file kv_file::create(const std::string & path, file_header header, const int32_t * tokens, const int8_t * phases,
                        const uint8_t * section) {
    header.magic = MAGIC;
    header.version = VERSION;
    header.params_bytes = sizeof(actqkv_params);
    kv_file file;
    const std::string temporary = path + ".tmp";
    file.path = path;
    file.head = header;
    file.layout = layout_of(header, path);
    file.all_tokens.assign(tokens, tokens + header.n_tokens);
    file.all_phases.assign(phases, phases + header.n_tokens);
    file.fd = open_temporary(temporary, path);
    try {
        // What a killed process left under this name is emptied; holes read as zeros.
        if (ftruncate(file.fd, 0) != 0 || ftruncate(file.fd, (off_t) file.layout.end) != 0) {
            fail_os("make", path, errno);
        }
        std::vector<uint8_t> bytes(sizeof(header) + sizeof(uint64_t));
        writer out = {bytes.data()};
        out.value(header);
        out.value(checksum(bytes.data(), out.used));
        file.write_at(0, bytes.data(), bytes.size());

        bytes.resize(header.n_tokens * 5 + sizeof(uint64_t));
        out = {bytes.data()};
        out.raw(tokens, header.n_tokens * sizeof(int32_t));
        out.raw(phases, header.n_tokens);
        out.value(checksum(bytes.data(), out.used));
        file.write_at(file.layout.tokens, bytes.data(), bytes.size());

        const uint64_t sum = checksum(section, header.section_bytes);
        file.write_at(file.layout.section, section, header.section_bytes);
        file.write_at(file.layout.section + header.section_bytes, &sum, sizeof(sum));
        if (fsync(file.fd) != 0) {
            fail_os("write to", path, errno);
        }
    } catch (...) {
        unlink(temporary.c_str());
        throw;
    }
    put_in_place(temporary, path);
    return file;
}

kv_file kv_file::open(const std::string & path, bool write) {
    kv_file file;
    file.path = path;
    file.fd = ::open(path.c_str(), (write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK); // a FIFO must not block
    if (file.fd < 0) {
        fail_os("open", path, errno);
    }
    struct stat found;
    if (fstat(file.fd, &found) != 0) {
        fail_os("open", path, errno);
    }
    if (!S_ISREG(found.st_mode)) {
        throw error(ACTQKV_ERR_STATE, format("%s is not a KV file of actqkv", path.c_str()));
    }
    if (write && flock(file.fd, LOCK_EX | LOCK_NB) != 0) {
        throw error(ACTQKV_ERR_FILE, format("%s is being written by another process", path.c_str()));
    }
    file.read_header();
    file.check_size();
    file.read_tokens();
    file.read_slots();
    return file;
}

void kv_file::read_header() {
    uint8_t bytes[sizeof(file_header) + sizeof(uint64_t)];
    static_assert(sizeof(bytes) <= HEADER_BYTES, "the tokens begin behind the header");
    struct stat found;
    if (fstat(fd, &found) != 0 || found.st_size < (off_t) sizeof(bytes)) {
        throw error(ACTQKV_ERR_STATE, format("%s is not a KV file of actqkv", path.c_str()));
    }
    read_at(0, bytes, sizeof(bytes));
    reader in = {bytes, sizeof(bytes)};
    head = in.value<file_header>();
    if (head.magic != MAGIC) {
        throw error(ACTQKV_ERR_STATE, format("%s is not a KV file of actqkv", path.c_str()));
    }
    if (head.version != VERSION || head.params_bytes != sizeof(actqkv_params)) {
        throw error(ACTQKV_ERR_STATE, format("%s is a KV file of version %u, expected %u: index the document again",
                                             path.c_str(), head.version, VERSION));
    }
    if (in.value<uint64_t>() != checksum(bytes, sizeof(file_header))) {
        fail_damaged(path, "the checksum of its header does not match");
    }
    const int64_t most = std::numeric_limits<int32_t>::max() / 2;
    bool sane = head.n_tokens >= 0 && head.n_tokens <= most && head.n_chunks >= 0 && head.n_chunks <= head.n_tokens &&
                head.n_layer > 0 && head.n_layer <= 4096 && head.checkpoint_tokens > 0 &&
                head.params.method.n_chunk_tokens > 0;
    for (const uint64_t chunk_bytes : head.chunk_bytes) {
        sane = sane && chunk_bytes <= (1ull << 32);
    }
    if (!sane || memchr(head.params.method.name, 0, sizeof(head.params.method.name)) == nullptr) {
        fail_damaged(path, "its header is inconsistent");
    }
    layout = layout_of(head, path);
}

void kv_file::check_size() const {
    struct stat found;
    if (fstat(fd, &found) != 0) {
        fail_os("read", path, errno);
    }
    if ((uint64_t) found.st_size != layout.end) {
        throw error(ACTQKV_ERR_STATE, format("%s is truncated: it has %llu bytes, expected %llu", path.c_str(),
                                             (unsigned long long) found.st_size, (unsigned long long) layout.end));
    }
}

void kv_file::read_tokens() {
    std::vector<uint8_t> bytes(head.n_tokens * 5 + sizeof(uint64_t));
    read_at(layout.tokens, bytes.data(), bytes.size());
    reader in = {bytes.data(), bytes.size()};
    all_tokens.resize(head.n_tokens);
    all_phases.resize(head.n_tokens);
    in.raw(all_tokens.data(), head.n_tokens * sizeof(int32_t));
    in.raw(all_phases.data(), head.n_tokens);
    const uint64_t expected = checksum(bytes.data(), in.used);
    if (in.value<uint64_t>() != expected) {
        fail_damaged(path, "the checksum of its tokens does not match");
    }
}

std::vector<uint8_t> kv_file::section() const {
    std::vector<uint8_t> bytes(head.section_bytes);
    uint64_t sum = 0;
    read_at(layout.section, bytes.data(), bytes.size());
    read_at(layout.section + bytes.size(), &sum, sizeof(sum));
    if (sum != checksum(bytes.data(), bytes.size())) {
        fail_damaged(path, "the checksum of its document does not match");
    }
    return bytes;
}

// ---- slots

bool kv_file::read_slot(int i, file_slot & slot, uint64_t & number, std::vector<uint32_t> & rows) const {
    const uint64_t offset = layout.slots + i * aligned(head.slot_bytes);
    slot_header found;
    if (head.slot_bytes < sizeof(found) + sizeof(uint64_t)) {
        fail_damaged(path, "its slots are too small");
    }
    read_at(offset, &found, sizeof(found));
    if (found.magic != SLOT_MAGIC || found.payload_bytes > head.slot_bytes - sizeof(found) - sizeof(uint64_t)) {
        return false;
    }
    std::vector<uint8_t> bytes(sizeof(found) + found.payload_bytes);
    uint64_t sum = 0;
    read_at(offset, bytes.data(), bytes.size());
    read_at(offset + bytes.size(), &sum, sizeof(sum));
    if (sum != checksum(bytes.data(), bytes.size())) {
        return false;
    }
    if (found.n_done < 0 || found.n_done > head.n_tokens || found.n_closed < 0 || found.n_closed > head.n_chunks ||
        found.complete > 1) {
        fail_damaged(path, "a checkpoint lies beyond its end");
    }
    rows.resize(row_of(0, 0, found.n_closed));
    read_at(layout.table, rows.data(), rows.size() * sizeof(uint32_t));
    if (found.table_checksum != checksum(rows.data(), rows.size() * sizeof(uint32_t))) {
        fail_damaged(path, "the checksum of its table does not match");
    }
    slot = {found.n_done, found.n_closed, found.complete == 1, {bytes.begin() + sizeof(found), bytes.end()}};
    number = found.sequence;
    return true;
}

// The greater sequence of two whole slots; a writer that was killed has left at least one of them whole.
void kv_file::read_slots() {
    uint64_t numbers[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        slot_header found;
        read_at(layout.slots + i * aligned(head.slot_bytes), &found, sizeof(found));
        numbers[i] = found.magic == SLOT_MAGIC ? found.sequence : 0;
    }
    const int newer = numbers[1] > numbers[0] ? 1 : 0;
    if (read_slot(newer, current, sequence, table) || read_slot(1 - newer, current, sequence, table)) {
        return;
    }
    if (numbers[0] > 1 || numbers[1] > 1) { // the first one alone may be torn: there was nothing before it
        fail_damaged(path, "the checksums of its checkpoints do not match");
    }
}

void kv_file::write_slot(const file_slot & slot) {
    finish();
    const uint64_t before = row_of(0, 0, current.n_closed), rows = row_of(0, 0, slot.n_closed);
    table.resize(std::max<uint64_t>(table.size(), rows));
    write_at(layout.table + before * sizeof(uint32_t), table.data() + before, (rows - before) * sizeof(uint32_t));
    const slot_header found = {SLOT_MAGIC,
                               sequence + 1,
                               slot.n_done,
                               slot.n_closed,
                               checksum(table.data(), rows * sizeof(uint32_t)),
                               slot.complete ? 1u : 0u,
                               0,
                               slot.payload.size()};
    std::vector<uint8_t> bytes(sizeof(found) + slot.payload.size() + sizeof(uint64_t));
    if (bytes.size() > head.slot_bytes) {
        throw error(ACTQKV_ERR_INTERNAL,
                    format("a checkpoint has %llu bytes, a slot %llu", (unsigned long long) bytes.size(),
                           (unsigned long long) head.slot_bytes));
    }
    writer out = {bytes.data()};
    out.value(found);
    out.raw(slot.payload.data(), slot.payload.size());
    out.value(checksum(bytes.data(), out.used));
    const uint64_t offset = layout.slots + (sequence + 1) % 2 * aligned(head.slot_bytes);
    next = {slot.n_done, slot.n_closed, slot.complete, {}};
    writing = std::async(std::launch::async, [this, offset, bytes = std::move(bytes)] {
        sync();
        write_at(offset, bytes.data(), bytes.size());
        sync();
    });
}

void kv_file::sync() const {
    if (fdatasync(fd) != 0) {
        fail_os("write to", path, errno);
    }
}

bool kv_file::busy() const {
    return writing.valid() && writing.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
}

void kv_file::finish() {
    if (writing.valid()) {
        writing.get();
        sequence++;
        current = next;
    }
}

void kv_file::end_writing() {
    if (writing.valid()) {
        writing.wait();
    }
    if (fd >= 0) {
        flock(fd, LOCK_UN);
    }
}

// ---- chunks

uint32_t kv_file::sum_of(int64_t chunk, const chunk_array & in) const {
    const uint64_t piece = in.chunk_bytes / in.n_rows;
    if (in.n_rows == 1) {
        return folded(checksum(in.data + chunk * piece, piece));
    }
    std::vector<uint8_t> gathered(in.chunk_bytes);
    gather(in, chunk, gathered.data());
    return folded(checksum(gathered.data(), gathered.size()));
}

void kv_file::write_chunks(int il, int array, int64_t first, int64_t last, const chunk_array & from) {
    if (from.chunk_bytes == 0 || first >= last) {
        return;
    }
    table.resize(std::max<uint64_t>(table.size(), row_of(0, 0, last)));
    std::vector<uint8_t> gathered;
    const uint8_t * data = from.data + first * from.chunk_bytes;
    if (from.n_rows > 1) {
        gathered.resize((last - first) * from.chunk_bytes);
        for (int64_t b = first; b < last; b++) {
            gather(from, b, gathered.data() + (b - first) * from.chunk_bytes);
        }
        data = gathered.data();
    }
    for (int64_t b = first; b < last; b++) {
        table[row_of(il, array, b)] = folded(checksum(data + (b - first) * from.chunk_bytes, from.chunk_bytes));
    }
    write_at(array_offset(il, array) + first * from.chunk_bytes, data, (last - first) * from.chunk_bytes);
}

void kv_file::read_chunks(int il, int array, int64_t n, const chunk_array & to) const {
    const uint64_t piece = to.chunk_bytes / to.n_rows, offset = array_offset(il, array);
    if (to.n_rows == 1) {
        read_at(offset, to.data, n * to.chunk_bytes);
        return;
    }
    std::vector<uint8_t> gathered(n * to.chunk_bytes);
    read_at(offset, gathered.data(), gathered.size());
    for (int64_t b = 0; b < n; b++) {
        for (int64_t i = 0; i < to.n_rows; i++) {
            memcpy(to.data + i * to.row_stride + b * piece, gathered.data() + b * to.chunk_bytes + i * piece, piece);
        }
    }
}

uint64_t kv_file::map_granule() { return sysconf(_SC_PAGESIZE); }

bool kv_file::map(int il, int array, uint64_t begin, uint64_t end, const chunk_array & to) const {
    const uint64_t granule = map_granule();
    uint8_t * const at = to.data + begin;
    if (to.n_rows > 1 || (uintptr_t) at % granule != 0 || begin % granule != 0 || end % granule != 0 ||
        ALIGN % granule != 0) {
        return false;
    }
    if (begin >= end) {
        return true;
    }
#ifdef MAP_NORESERVE
    const int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
#else
    const int flags = MAP_PRIVATE | MAP_FIXED;
#endif
    const off_t offset = (off_t) (array_offset(il, array) + begin);
    if (mmap(at, end - begin, PROT_READ | PROT_WRITE, flags, fd, offset) == MAP_FAILED) {
        const int code = errno; // what lay here may be gone, and be all that the session had
        mmap(at, end - begin, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
        read_at((uint64_t) offset, at, end - begin);
        fail_os("map", path, code);
    }
    // Chunks are read from all over: what lies around them is not to come along. A first question after 143,268 tokens in
    // a file of 491 MB, none of it in memory: 96 MB of it resident, otherwise 249 MB.
    if (array == FILE_KEYS || array == FILE_VALUES) {
        madvise(at, end - begin, MADV_RANDOM);
    }
    return true;
}

void kv_file::compare(int il, int array, int64_t chunk, uint32_t sum) const {
    if (sum != table[row_of(il, array, chunk)]) {
        fail_damaged(path, format("%s %lld of layer %d is not what was written",
                                  array == FILE_INDEX ? "stretch" : "chunk", (long long) chunk, il));
    }
}

void kv_file::check_chunk(int il, int array, int64_t chunk, const chunk_array & in) const {
    compare(il, array, chunk, sum_of(chunk, in));
}

void kv_file::verify_chunks(int il, int array, int64_t first, int64_t last) const {
    const uint64_t chunk_bytes = head.chunk_bytes[array];
    std::vector<uint8_t> bytes((last - first) * chunk_bytes);
    read_at(array_offset(il, array) + first * chunk_bytes, bytes.data(), bytes.size());
    for (int64_t b = first; b < last; b++) {
        compare(il, array, b, folded(checksum(bytes.data() + (b - first) * chunk_bytes, chunk_bytes)));
    }
}

// ---- verify

bool verify_file(const std::string & path, actqkv_progress_fn progress, void * user) {
    const kv_file file = kv_file::open(path, false);
    file.section();
    const file_header & h = file.header();
    const int64_t n_closed = file.last().n_closed, step = 256;
    int64_t done = 0, total = 0;
    for (int a = 0; a < N_FILE_ARRAYS; a++) {
        total += h.n_layer * kv_file::n_kept(a, n_closed, h.params.method.n_chunk_tokens) * h.chunk_bytes[a];
    }
    for (int il = 0; il < h.n_layer; il++) {
        for (int a = 0; a < N_FILE_ARRAYS; a++) {
            const int64_t n = kv_file::n_kept(a, n_closed, h.params.method.n_chunk_tokens);
            for (int64_t first = 0; first < n && h.chunk_bytes[a] > 0; first += step) {
                const int64_t last = std::min(n, first + step);
                file.verify_chunks(il, a, first, last);
                done += (last - first) * h.chunk_bytes[a];
                if (progress != nullptr && !progress(user, done, total) && done < total) {
                    return false;
                }
            }
        }
    }
    return true;
}

} // namespace actqkv
