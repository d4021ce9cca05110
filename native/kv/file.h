// A KV file (.akv): one reading, kept for ever. It grows while the text is read, and is mapped when it is opened.
//
// What never changes lies apart from what does: the keys, values and summaries of a closed chunk are written once, and
// all else that a session is at some window boundary (sinks, tokens of no closed chunk, attention sums, statistics,
// entropies) goes as one checkpoint into one of two slots, in turn. Little-endian; a part begins at a multiple of ALIGN.
//
//   offset  bytes  header
//        0      8  magic "AKVFILE\0"
//        8      4  version: 3
//       12      4  bytes of actqkv_params
//       16      8  model: shape, vocabulary and norms (session/serial.h); another quantisation has the same
//       24      8  n_tokens of the whole reading, also those that are still to be read
//       32      8  section_bytes
//       40      8  slot_bytes
//       48      8  n_chunks that can close among n_tokens
//       56      4  n_layer
//       60      4  checkpoint_tokens: from one checkpoint to the next
//       64   5x 8  chunk_bytes of each array: K, V, summary, its norm, index; of one chunk and layer; 0: there are none
//      104      *  actqkv_params of the reading, positions resolved; n_ctx and n_threads mean nothing; zeros up to a
//                  multiple of 8
//        *      8  checksum (kv/bytes.h) of all before
//
//   part       what
//   tokens     i32[n_tokens], i8[n_tokens] their phases, u64 checksum of both
//   section    u8[section_bytes] of the caller (actqkv_cpp/kvfile.py: text, offsets, model), u64 checksum
//   slot A, B  slot_bytes each:
//                 0  8  magic "AKVSLOT\0"
//                 8  8  sequence: the greater of two valid slots counts
//                16  8  n_done: tokens that the checkpoint comes after
//                24  8  n_closed: chunks that are in the file by then
//                32  8  checksum of the table's first n_closed rows
//                40  4  complete: 1 when all of the reading is done
//                44  4  0
//                48  8  payload_bytes
//                56  *  payload: of session/file.cpp
//                 *  8  checksum of all before
//   table      u32[n_chunks][n_layer][5]: checksum of each chunk in each array, its two halves xor'ed
//   arrays     per layer K, V, summaries, norms, index: u8[n_chunks][chunk_bytes]. An element of the index is a stretch of
//              65,536 tokens (stretches.h), whose row of the table is that of its last chunk
//
// Order of writes: chunks and their rows of the table, fdatasync, slot, fdatasync. Whatever kills a writer, the other
// slot is whole and all that it speaks of is on the disk. The reading does not wait for the disk: a thread does, and while
// it does, further chunks are written and no slot. All offsets follow from the header, so the file's size is
// known from it and must agree. What is not written yet is a hole.
//
// An opened file is mapped copy-on-write: processes share its memory, and nothing is ever written through the mapping.
// Its chunks are checked against the table when they are first used. Cutting a file short while it is open is noticed
// after the window that it happens in (guard.h), whose result is thrown away.
#pragma once

#include "actqkv.h"
#include "layout.h"

#include <cstdint>
#include <future>
#include <string>
#include <vector>

namespace actqkv {

enum file_array { FILE_KEYS, FILE_VALUES, FILE_SUMMARIES, FILE_NORMS, FILE_INDEX, N_FILE_ARRAYS };

struct file_header {
    uint64_t magic;
    uint32_t version;
    uint32_t params_bytes;
    uint64_t model;
    int64_t n_tokens;
    uint64_t section_bytes;
    uint64_t slot_bytes;
    int64_t n_chunks;
    int32_t n_layer;
    int32_t checkpoint_tokens;
    uint64_t chunk_bytes[N_FILE_ARRAYS];
    actqkv_params params;
};

// One array of closed chunks in memory. Chunk b is n_rows pieces of chunk_bytes / n_rows each; piece i lies at
// data + i*row_stride + b*chunk_bytes/n_rows.
struct chunk_array {
    uint8_t * data;
    uint64_t chunk_bytes;
    int64_t n_rows;
    uint64_t row_stride; // bytes
};

// What a slot holds.
struct file_slot {
    int64_t n_done = 0;
    int64_t n_closed = 0;
    bool complete = false;
    std::vector<uint8_t> payload;
};

class kv_file {
public:
    // Makes the file with everything but slots and chunks; it appears whole or not at all. magic, version and
    // params_bytes of `header` are filled in. ACTQKV_ERR_FILE where there is such a file, or it cannot be made.
    static kv_file create(const std::string & path, file_header header, const int32_t * tokens, const int8_t * phases,
                          const uint8_t * section);

    // Checks header, size, tokens and slots. `write`: for one writer at a time, else read-only.
    // ACTQKV_ERR_FILE where the system refuses; ACTQKV_ERR_STATE where the file is damaged or no KV file.
    static kv_file open(const std::string & path, bool write);

    kv_file(kv_file && other) noexcept;
    kv_file & operator=(kv_file &&) = delete;
    ~kv_file();

    // Elements of an array that the file has where it has the first n chunks: of the index, an element is a stretch.
    static int64_t n_kept(int array, int64_t n, int32_t n_chunk_tokens) {
        return array == FILE_INDEX ? n / stretch_chunks(n_chunk_tokens) : n;
    }

    const char * name() const { return path.c_str(); }
    const file_header & header() const { return head; }
    uint64_t bytes() const { return layout.end; }
    const std::vector<int32_t> & tokens() const { return all_tokens; }
    const std::vector<int8_t> & phases() const { return all_phases; }
    std::vector<uint8_t> section() const;

    // The last checkpoint, n_done 0 where there is none yet; and its payload, once, after opening.
    const file_slot & last() const { return current; }
    std::vector<uint8_t> take_payload() { return std::move(current.payload); }

    // Writes chunks [first, last) of an array of a layer and remembers their checksums. They count from the next
    // checkpoint on.
    void write_chunks(int il, int array, int64_t first, int64_t last, const chunk_array & from);
    // Begins to write the checkpoint after the last(), which goes to the disk after everything that it speaks of. It
    // becomes the last() when finish() has waited for it; one that is being written is waited for first.
    // ACTQKV_ERR_FILE, here or from finish(), where the disk refuses: last() stays.
    void write_slot(const file_slot & slot);
    bool busy() const; // finish() would wait
    void finish();
    // From now on another writer may go on with the file, which stays mapped. Waits for what is being written.
    void end_writing();

    // Copies chunks [0, n) of an array out of the file. Unchecked.
    void read_chunks(int il, int array, int64_t n, const chunk_array & to) const;
    // Maps bytes [begin, end) of an array copy-on-write over the memory at to.data + begin. False, and nothing happens,
    // where one of the three is no multiple of map_granule(), or the array lies in several rows. ACTQKV_ERR_FILE where the
    // system refuses; the bytes are in memory then.
    bool map(int il, int array, uint64_t begin, uint64_t end, const chunk_array & to) const;

    static uint64_t map_granule(); // bytes

    // ACTQKV_ERR_STATE where the chunk in memory is not what was written.
    void check_chunk(int il, int array, int64_t chunk, const chunk_array & in) const;
    // The same for chunks [first, last) on the disk.
    void verify_chunks(int il, int array, int64_t first, int64_t last) const;
    // ACTQKV_ERR_STATE where the file is not as long any more as when it was opened.
    void check_size() const;

private:
    struct offsets {
        uint64_t tokens, section, slots, table, arrays, end;
    };

    kv_file() = default;
    static offsets layout_of(const file_header & header, const std::string & path);
    uint64_t array_offset(int il, int array) const;
    uint64_t array_bytes(int array) const;
    void read_at(uint64_t offset, void * data, uint64_t n) const;
    void write_at(uint64_t offset, const void * data, uint64_t n) const;
    void sync() const;
    void read_header();
    void read_tokens();
    void read_slots();
    uint32_t sum_of(int64_t chunk, const chunk_array & in) const;
    void compare(int il, int array, int64_t chunk, uint32_t sum) const;
    bool read_slot(int i, file_slot & slot, uint64_t & sequence, std::vector<uint32_t> & rows) const;
    uint64_t row_of(int il, int array, int64_t chunk) const {
        chunk = array == FILE_INDEX ? (chunk + 1) * stretch_chunks(head.params.method.n_chunk_tokens) - 1 : chunk;
        return (chunk * head.n_layer + il) * N_FILE_ARRAYS + array;
    }

    std::string path;
    int fd = -1;
    file_header head = {};
    offsets layout = {};
    std::vector<int32_t> all_tokens;
    std::vector<int8_t> all_phases;
    std::vector<uint32_t> table; // rows up to the last chunk written
    file_slot current, next;     // next: being written, without its payload
    uint64_t sequence = 0;
    std::future<void> writing;
};

// Reads a whole KV file and checks every part of it; progress as actqkv_progress_fn, in bytes. Returns false when it
// said stop.
bool verify_file(const std::string & path, actqkv_progress_fn progress, void * user);

} // namespace actqkv
