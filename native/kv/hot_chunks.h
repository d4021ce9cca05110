// Which closed chunks have a copy in the GPU's memory. Each layer has the same number of slots, as many as the byte limit
// gives; a plan's chunks are brought into slots, and what was planned least, lately, makes room. The mass that chunks receive
// would not choose better (native/README.md, On a GPU), and the host would have to fetch it.
//
// Plain bookkeeping: whoever copies is behind `mover`, so that this is tested without a GPU. One thread at a time.
#pragma once

#include <cstdint>
#include <vector>

namespace actqkv {

// Copies chunks beside the computation, in the order they were started.
class mover {
public:
    virtual ~mover() = default;
    // Starts copying a chunk of layer il into a slot of that layer, over what is there. What was queued to read the slot
    // before comes first.
    virtual void start(int il, int32_t chunk, int32_t slot) = 0;
};

struct hot_stats {
    uint64_t n_hits;       // planned chunks that were there, or on their way
    uint64_t n_misses;     // planned chunks that were not
    uint64_t n_prefetched; // chunks brought in on a guess
    uint64_t n_wasted;     // of these, how many left again without having been planned
    uint64_t bytes;        // copied
};

class hot_chunks {
public:
    // n_slots_for() slots in each of n_layer layers. Throws ACTQKV_ERR_MEMORY where a plan of n_most chunks does not fit.
    hot_chunks(int n_layer, uint64_t chunk_bytes, uint64_t byte_limit, int32_t n_most, mover & copies);

    static int32_t n_slots_for(int n_layer, uint64_t chunk_bytes, uint64_t byte_limit);
    // The least byte_limit that holds plans of n_most chunks: what a refusal names.
    static uint64_t least_bytes(int n_layer, uint64_t chunk_bytes, int32_t n_most);

    int32_t n_slots() const { return slots_per_layer; }

    // Slots of the planned chunks (each named once, at most n_most), in their order, copied or being copied in order.
    // They keep their slots until the layer's next plan.
    const std::vector<int32_t> & plan(int il, const int32_t * chunks, int32_t n);
    // A guess at the layer's next plan, best first: brings in what is missing, as far as slots are free of the current
    // plan and of chunks that the guess names.
    void prefetch(int il, const int32_t * chunks, int32_t n);
    // Brings chunks [first, last) into free slots, as far as there are any.
    void fill(int il, int32_t first, int32_t last);
    // Chunks from n_closed on are no longer what was copied, as after a rewind.
    void forget_from(int32_t n_closed);

    // Slots by chunk, -1: none; chunks behind the end have none. changes: how often the layer's have changed.
    bool is_hot(int il, int32_t chunk) const { return slot_of(layers[il], chunk) >= 0; }
    const std::vector<int32_t> & slots_of(int il) const { return layers[il].slot_of; }
    uint64_t changes(int il) const { return layers[il].n_changes; }

    const hot_stats & stats() const { return counts; }
    void reset_stats() { counts = {}; }

private:
    struct slot {
        int32_t chunk = -1;   // -1: free
        uint64_t named = 0;   // number of the last plan or guess that named it
        uint64_t warmed = 0;  // layer's plans when heat was last counted
        double heat = 0;      // then; fades with every plan
        bool guessed = false; // brought in by a guess, and not planned yet
    };
    struct layer {
        std::vector<slot> slots;
        std::vector<int32_t> slot_of; // by chunk, -1: none; as long as it has to be
        uint64_t number = 0;          // of the last plan or guess
        uint64_t planned = 0;         // number of the current plan: slots named since stay
        uint64_t n_plans = 0;
        uint64_t n_changes = 0;
        int32_t n_taken = 0; // slots that hold a chunk
    };

    int32_t slot_of(const layer & l, int32_t chunk) const;
    double heat_of(const layer & l, const slot & s) const;
    void warm(const layer & l, slot & s) const;
    std::vector<int32_t> coldest(const layer & l, uint64_t n) const;
    void bring(int il, int32_t chunk, int32_t at, bool guessed);
    void empty(layer & l, slot & s);

    uint64_t chunk_bytes;
    int32_t n_most;
    int32_t slots_per_layer;
    mover & copies;
    std::vector<layer> layers;
    std::vector<int32_t> found; // by plan()
    hot_stats counts = {};
};

} // namespace actqkv
