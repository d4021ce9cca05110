// search - which chunks hold the keys that a query attends to; formulas: ../cpu/search.cpp, where keys lie:
// ../cpu/cells.h.
//
// Five kernels. Scores: a warp per 16 cells, whose centres lie together, against four query heads at a time; the first
// blocks also leave what the others need. Picking: a block per query head. Then a warp per head and cell that is looked
// into, twice: logits of its keys, and, once the softmax is known, their weights, added up by chunk as whole numbers,
// so that the order of these sums does not matter. Then votes are made floats.
#include <new>

#include "top_k.cuh"

namespace actqkv::cuda {
namespace {

constexpr int BLOCKS_AT = 64;                        // bytes of a stretch before its blocks
constexpr int CELLS = 16, MOST_KEYS = 256, RUN = 32; // of a block; keys of a cell, of one in order
constexpr int SCORE_WARPS = 4, QUERIES = 4;          // as many, so that each warp prepares a query
constexpr int LOOK_WARPS = 8;
constexpr int PATTERNS = 16, GREATEST = 63; // of four signs; what sums of them are rounded to
constexpr float LOG2_E = 1.44269504f, LEAST = 1, REACH = 3;
constexpr double VOTE = (double) (1ll << 40); // what a vote of 1 is as a whole number

__host__ __device__ inline int64_t block_bytes(int d) { return (4 * 4 + d / 2) * CELLS; }
__host__ __device__ inline int64_t key_bytes(int d) { return 3 + d / 8; }

int64_t most_cells(int64_t n_keys, int32_t in_order) {
    return in_order ? n_keys / in_order * divided_up(in_order, RUN) : n_keys / 64 + n_keys / MOST_KEYS + 1;
}

struct stretch {
    const uint8_t * data; // of KV head 0
    int64_t head_stride, keys_at;
    int32_t first_chunk;
    int32_t first_block; // of cells, over all stretches as long as they may be
};

// The part of a slot's keys in the softmax of all that its head looks at.
struct part {
    float most, sum; // of 2^(logit - most)
    int32_t n;
};

struct search {
    int n_head, r, d, n_stretches, n_divided; // stretches
    int n_blocks;                             // of cells, at most
    const stretch * stretches;
    const float * query;
    float scale;
    int64_t n_cells, n_chunks;
    float * scores;
    int n_picked, n_slots; // cells that a head looks into: first those that it picked, then those in order, at most
    int n_first;           // slots for those that it picked
    int32_t * picked;
    float * votes;
    float *turned, *lengths;   // [H][d] queries times scale, [H]
    int32_t * firsts;          // [G][n_stretches + 1] how many cells lie before each stretch
    float * logits;            // [H][keys()]
    part * parts;              // [H][n_slots]
    unsigned long long * sums; // [n_chunks]

    __host__ __device__ int64_t keys() const { return key_of(n_slots); }
    __host__ __device__ int64_t key_of(int slot) const {
        return slot < n_first ? (int64_t) slot * MOST_KEYS : (int64_t) n_first * MOST_KEYS + (slot - n_first) * RUN;
    }
};

__device__ int sum_whole(int x) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL, x, step);
    }
    return x;
}

// By a warp: how many of n ascending numbers, `stride` bytes apart, are not beyond x.
__device__ int count_up_to(const int32_t * numbers, int stride, int n, int x) {
    int found = 0;
    for (int i = (int) threadIdx.x % WARP; i < n; i += WARP) {
        found +=
            *reinterpret_cast<const int32_t *>(reinterpret_cast<const uint8_t *>(numbers) + (int64_t) i * stride) <= x;
    }
    return sum_whole(found);
}

__device__ const uint8_t * head_of(const search & a, int s, int g) {
    return a.stretches[s].data + g * a.stretches[s].head_stride;
}
__device__ int cells_of(const search & a, int s, int g) { return *reinterpret_cast<const int32_t *>(head_of(a, s, g)); }

// By a warp: cells of the stretches before s.
__device__ int cells_before(const search & a, int s, int g) {
    int n = 0;
    for (int i = (int) threadIdx.x % WARP; i < s; i += WARP) {
        n += cells_of(a, i, g);
    }
    return sum_whole(n);
}

// ---- scores

// A query in signed bytes, as centres meet it.
struct rounded {
    int offset;   // 8 times the sum of its numbers
    float step;   // what 1 stands for
    float factor; // of reaches
};

// By a warp, x [d] in shared memory: a query turned and times scale, and as bytes.
__device__ rounded prepare(const search & a, int h, float * x, int8_t * whole, bool keep) {
    const int lane = (int) threadIdx.x % WARP;
    for (int e = lane; e < a.d; e += WARP) {
        x[e] = a.query[(int64_t) h * a.d + e] * a.scale;
    }
    turn(x, a.d, lane, WARP, [] { __syncwarp(); });
    float most = 0;
    double squares = 0;
    for (int e = lane; e < a.d; e += WARP) {
        most = fmaxf(most, fabsf(x[e]));
        squares += x[e] * x[e];
    }
    most = max_lanes<WARP>(most);
    for (int step = WARP / 2; step > 0; step /= 2) {
        squares += __shfl_xor_sync(ALL, squares, step);
    }
    const float inverse = most > 0 && isfinite(most) ? 127 / most : 0, length = (float) sqrt(squares);
    int sum = 0;
    for (int e = lane; e < a.d; e += WARP) {
        const float exact = x[e] * inverse;
        whole[e] = (int8_t) (isfinite(exact) ? (int) rintf(exact) : 0);
        sum += whole[e];
        if (keep) {
            a.turned[(int64_t) h * a.d + e] = x[e];
        }
    }
    if (keep && lane == 0) {
        a.lengths[h] = length;
    }
    return {8 * sum_whole(sum), inverse > 0 ? 1 / inverse : 0, REACH * length};
}

// What the other kernels need beside scores, and votes of 0.
__device__ void leave(const search & a) {
    const int warp = (int) threadIdx.x / WARP, g = (int) blockIdx.y;
    for (int s = warp; blockIdx.x == 0 && s <= a.n_stretches; s += SCORE_WARPS) {
        a.firsts[g * (a.n_stretches + 1) + s] = cells_before(a, s, g);
    }
    const int64_t n_threads = (int64_t) gridDim.x * gridDim.y * blockDim.x;
    for (int64_t b = ((int64_t) g * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x; b < a.n_chunks;
         b += n_threads) {
        a.sums[b] = 0;
    }
}

// grid.x: blocks of cells, a warp each; grid.y: KV heads.
__global__ void __launch_bounds__(SCORE_WARPS * WARP) score_kernel(search a) {
    __shared__ rounded queries[QUERIES];
    const int warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP, g = (int) blockIdx.y;
    float * x = reinterpret_cast<float *>(dynamic_shared()); // [QUERIES][d], then as bytes
    int8_t * whole = reinterpret_cast<int8_t *>(x + QUERIES * a.d);
    const int32_t * fours = reinterpret_cast<const int32_t *>(whole);
    leave(a);
    const int b = (int) blockIdx.x * SCORE_WARPS + warp;
    const int s = count_up_to(&a.stretches->first_block, sizeof(stretch), a.n_stretches, b) - 1;
    const bool has_cells = b < a.n_blocks;
    const int64_t i = has_cells ? (int64_t) (b - a.stretches[s].first_block) * CELLS + lane % CELLS : 0;
    const bool is_one =
        has_cells && i < cells_of(a, s, g); // of this lane and the one that has the other half of its rows
    const int64_t at = has_cells ? cells_before(a, s, g) + i : 0;
    const uint8_t * block = has_cells ? head_of(a, s, g) + BLOCKS_AT + i / CELLS * block_bytes(a.d) : nullptr;
    const float * facts = reinterpret_cast<const float *>(block) + lane % CELLS; // steps, then reaches
    const uint32_t * rows = reinterpret_cast<const uint32_t *>(block) + 2 * CELLS + lane % CELLS;
    for (int first = 0; first < a.r; first += QUERIES) {
        const int n = a.r - first < QUERIES ? a.r - first : QUERIES, h = g * a.r + first;
        __syncthreads();                     // what was there has been met
        const int own = warp < n ? warp : 0; // those that are not there are the first once more
        const rounded q = prepare(a, h + own, x + warp * a.d, whole + warp * a.d, blockIdx.x == 0 && own == warp);
        if (lane == 0) {
            queries[warp] = q;
        }
        __syncthreads();
        int sums[QUERIES] = {};
        for (int w = lane / CELLS; is_one && w < a.d / 8; w += 2) {
            const uint32_t row = rows[w * CELLS], low = row & 0x0f0f0f0fu, high = row >> 4 & 0x0f0f0f0fu;
#pragma unroll
            for (int y = 0; y < QUERIES; y++) {
                const int32_t * four = fours + y * a.d / 4 + 2 * w;
                sums[y] = __dp4a((int) high, four[1], __dp4a((int) low, four[0], sums[y]));
            }
        }
#pragma unroll
        for (int y = 0; y < QUERIES; y++) {
            const int sum = sums[y] + __shfl_xor_sync(ALL, sums[y], CELLS) - queries[y].offset;
            if (is_one && lane < CELLS && y < n) {
                a.scores[(h + y) * a.n_cells + at] =
                    queries[y].step * facts[0] * (float) sum + queries[y].factor * facts[CELLS];
            }
        }
    }
}

// ---- picking

// A block per query head.
template <int THREADS> __global__ void __launch_bounds__(THREADS) pick_kernel(search a) {
    const int h = (int) blockIdx.x;
    const int n = a.firsts[h / a.r * (a.n_stretches + 1) + a.n_divided];
    int32_t * picked = a.picked + (int64_t) h * a.n_picked;
    if (a.n_picked < n) {
        choose_best<THREADS>(a.scores + h * a.n_cells, n, a.n_picked, picked);
        return;
    }
    for (int i = (int) threadIdx.x; i < a.n_picked; i += THREADS) {
        picked[i] = i < n ? i : -1;
    }
}

// ---- keys

// Keys of the cell in a slot; n 0: there is none.
struct looked_at {
    const uint8_t * keys;
    int n, first_chunk;
    float base, size; // as ../cpu/ops.h: scan_cell

    __device__ int padded() const { return (n + 15) / 16 * 16; }
};

// By a warp.
__device__ looked_at find(const search & a, int h, int slot) {
    const int g = h / a.r;
    const int32_t * firsts = a.firsts + g * (a.n_stretches + 1);
    const bool may = slot < a.n_slots, is_picked = slot < a.n_first;
    const int number = !may        ? -1
                       : is_picked ? a.picked[(int64_t) h * a.n_picked + slot]
                                   : firsts[a.n_divided] + slot - a.n_first;
    if (number < 0 || number >= firsts[a.n_stretches]) { // all lanes alike
        return {nullptr, 0, 0, 0, 0};
    }
    const int s = count_up_to(firsts + 1, sizeof(int32_t), a.n_stretches, number), i = number - firsts[s];
    const uint8_t * head = head_of(a, s, g);
    const float * facts = reinterpret_cast<const float *>(head + BLOCKS_AT + i / CELLS * block_bytes(a.d)) + i % CELLS;
    const float * last = facts + (2 + a.d / 8) * CELLS; // behind the centres
    const float score = a.scores[h * a.n_cells + number], reach = facts[CELLS];
    uint32_t place;
    memcpy(&place, last + CELLS, sizeof(place));
    return {head + a.stretches[s].keys_at + place / MOST_KEYS * 16 * key_bytes(a.d), (int) (place % MOST_KEYS) + 1,
            a.stretches[s].first_chunk, (score - REACH * a.lengths[h] * reach) * LOG2_E, *last};
}

// By a block: sums of four channels of a query with all patterns of signs, tables [d/4][PATTERNS] in shared memory, as
// whole multiples of what is returned.
__device__ float make_tables(const search & a, int h, int * tables, float * room) {
    const float * query = a.turned + (int64_t) h * a.d;
    float most = 0, all = 0;
    for (int p = (int) threadIdx.x; p < a.d / 4; p += LOOK_WARPS * WARP) {
        const float * q = query + 4 * p;
        const float sum = fabsf(q[0]) + fabsf(q[1]) + fabsf(q[2]) + fabsf(q[3]);
        most = fmaxf(most, sum);
        all += sum;
    }
    most = max_block(most, room);
    all = sum_block(all, room);
    const bool has_some = most > 0 && isfinite(all) && isfinite(GREATEST / most);
    const float inverse = has_some ? GREATEST / most : 0;
    for (int i = (int) threadIdx.x; i < a.d / 4 * PATTERNS; i += LOOK_WARPS * WARP) {
        const float * q = query + i / PATTERNS * 4;
        float sum = -q[0] - q[1] - q[2] - q[3];
        for (int e = 0; e < 4; e++) {
            sum += i >> e & 1 ? 2 * q[e] : 0;
        }
        tables[i] = has_some ? (int) rintf(sum * inverse) : 0;
    }
    __syncthreads();
    return has_some ? 1 / inverse : 0;
}

// grid.x: slots, a warp each; grid.y: query heads.
__global__ void __launch_bounds__(LOOK_WARPS * WARP) look_kernel(search a) {
    __shared__ float room[WARP];
    int * tables = reinterpret_cast<int *>(dynamic_shared());
    const int h = (int) blockIdx.y, lane = (int) threadIdx.x % WARP;
    const int slot = (int) blockIdx.x * LOOK_WARPS + (int) threadIdx.x / WARP;
    const float step = 256 * LOG2_E * make_tables(a, h, tables, room);
    const looked_at cell = find(a, h, slot);
    const int m = cell.padded();
    const uint8_t *sizes = cell.keys, *signs = sizes + 3 * m;
    float * logits = a.logits + h * a.keys() + a.key_of(slot);
    float most = -INFINITY, sum = 0; // of this lane's keys
    for (int k = lane; k < cell.n; k += WARP) {
        int product = 0;
#pragma unroll 8
        for (int row = 0; row < a.d / 8; row++) {
            const int byte = signs[(int64_t) row * m + k];
            product += tables[2 * row * PATTERNS + (byte & 15)] + tables[(2 * row + 1) * PATTERNS + (byte >> 4)];
        }
        product = (product * sizes[k] + 128) >> 8;
        logits[k] = cell.base + cell.size * step * (float) product;
        const float joint = fmaxf(most, logits[k]);
        sum = sum * exp2f(most - joint) + exp2f(logits[k] - joint);
        most = joint;
    }
    const float joint = max_lanes<WARP>(most);
    sum = sum_lanes<WARP>(lane < cell.n ? sum * exp2f(most - joint) : 0);
    if (slot < a.n_slots && lane == 0) {
        a.parts[(int64_t) h * a.n_slots + slot] = {joint, sum, cell.n};
    }
}

// The same grid.
__global__ void __launch_bounds__(LOOK_WARPS * WARP) vote_kernel(search a) {
    __shared__ float room[WARP];
    __shared__ int counts[WARP];
    const int h = (int) blockIdx.y, lane = (int) threadIdx.x % WARP;
    const int slot = (int) blockIdx.x * LOOK_WARPS + (int) threadIdx.x / WARP;
    const part * parts = a.parts + (int64_t) h * a.n_slots;
    float most = -INFINITY, sum = 0;
    int n = 0;
    for (int i = (int) threadIdx.x; i < a.n_slots; i += LOOK_WARPS * WARP) {
        most = fmaxf(most, parts[i].most);
        n += parts[i].n;
    }
    most = max_block(most, room);
    n = sum_block(n, counts);
    for (int i = (int) threadIdx.x; i < a.n_slots; i += LOOK_WARPS * WARP) {
        sum += parts[i].n > 0 ? parts[i].sum * exp2f(parts[i].most - most) : 0;
    }
    sum = sum_block(sum, room);
    const float factor = sum > 0 ? 1 / sum : 0, least = LEAST * sum / (float) n;
    const looked_at cell = find(a, h, slot);
    const uint16_t * chunks = reinterpret_cast<const uint16_t *>(cell.keys + cell.padded());
    for (int k = lane; k < cell.n; k += WARP) {
        const float weight = exp2f(a.logits[h * a.keys() + a.key_of(slot) + k] - most);
        if (weight >= least) { // and no NaN
            atomicAdd(&a.sums[cell.first_chunk + chunks[k]], (unsigned long long) ((double) (weight * factor) * VOTE));
        }
    }
}

__global__ void finish_kernel(const unsigned long long * sums, int64_t n, float * votes) {
    const int64_t b = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (b < n) {
        votes[b] = (float) ((double) sums[b] / VOTE);
    }
}

// ---- calls

// Sizes, and arrays of the scratch; the list of stretches lies first in it. With scratch NULL it only counts.
uint64_t lay_out(const actqkv_search_args & args, search & a) {
    a = {};
    a.n_head = args.n_head;
    a.r = args.n_head / args.n_head_kv;
    a.d = args.d_head;
    a.n_stretches = args.n_stretches;
    a.query = args.query;
    a.scale = args.scale;
    a.n_cells = args.n_cells;
    a.n_chunks = args.n_chunks;
    a.scores = args.scores;
    a.n_picked = args.n_picked;
    a.picked = args.picked;
    a.votes = args.votes;
    a.n_first = (int) (args.n_picked < args.n_cells ? args.n_picked : args.n_cells);
    a.n_slots = a.n_first;
    for (int32_t s = 0; s < args.n_stretches; s++) {
        const actqkv_stretch & one = args.stretches[s];
        const int64_t n = most_cells(one.n_keys, one.in_order);
        a.n_divided += one.in_order == 0;
        a.n_blocks += (int) divided_up(n, CELLS);
        a.n_slots += one.in_order != 0 ? (int) n : 0;
    }
    arena place = {(uint8_t *) args.scratch};
    a.stretches = place.take<stretch>(args.n_stretches);
    a.turned = place.take<float>((uint64_t) a.n_head * a.d);
    a.lengths = place.take<float>(a.n_head);
    a.firsts = place.take<int32_t>((uint64_t) args.n_head_kv * (a.n_stretches + 1));
    a.logits = place.take<float>((uint64_t) a.n_head * a.keys());
    a.parts = place.take<part>((uint64_t) a.n_head * a.n_slots);
    a.sums = place.take<unsigned long long>(a.n_chunks);
    return place.used;
}

int32_t send_stretches(actqkv_cuda_stream * s, const actqkv_search_args & args, const search & a) {
    if (args.n_stretches == 0) {
        return 0;
    }
    const uint64_t bytes = args.n_stretches * sizeof(stretch);
    stretch * list = reinterpret_cast<stretch *>(to_send(s, bytes));
    int32_t first_block = 0;
    for (int32_t i = 0; i < args.n_stretches; i++) {
        const actqkv_stretch & one = args.stretches[i];
        const int64_t n_blocks = divided_up(most_cells(one.n_keys, one.in_order), CELLS);
        list[i] = {one.data, one.head_stride, BLOCKS_AT + n_blocks * block_bytes(a.d), (int32_t) one.first_chunk,
                   first_block};
        first_block += (int32_t) n_blocks;
    }
    return cudaMemcpyAsync((void *) a.stretches, list, bytes, cudaMemcpyHostToDevice, s->stream);
}

} // namespace

uint64_t search_scratch(const actqkv_search_args * args) {
    actqkv_search_args measured = *args;
    measured.scratch = nullptr;
    search a;
    return lay_out(measured, a);
}

int32_t search_score(actqkv_cuda_stream * s, const actqkv_search_args * args) {
    if (args->d_head % 16 != 0 || args->n_head % args->n_head_kv != 0) {
        return cudaErrorInvalidValue;
    }
    search a;
    lay_out(*args, a);
    int32_t status = cudaSetDevice(s->device);
    try {
        status = status != 0 ? status : send_stretches(s, *args, a);
    } catch (const std::bad_alloc &) {
        return cudaErrorMemoryAllocation;
    }
    const unsigned n = (unsigned) divided_up(a.n_blocks, SCORE_WARPS);
    return status != 0 ? status
                       : launch(s, score_kernel, dim3(n > 0 ? n : 1, (unsigned) args->n_head_kv),
                                dim3(SCORE_WARPS * WARP), QUERIES * a.d * (sizeof(float) + 1), a);
}

int32_t search_vote(actqkv_cuda_stream * s, const actqkv_search_args * args) {
    search a;
    lay_out(*args, a);
    const bool few = a.n_cells <= MOST_OF_FEW;
    const dim3 slots((unsigned) divided_up(a.n_slots, LOOK_WARPS), (unsigned) a.n_head), warps(LOOK_WARPS * WARP);
    int32_t status = launch(s, few ? pick_kernel<FEW> : pick_kernel<MANY>,
                            dim3(a.n_picked > 0 ? (unsigned) a.n_head : 0), dim3(few ? FEW : MANY), 0, a);
    status = status != 0 ? status : launch(s, look_kernel, slots, warps, a.d / 4 * PATTERNS * sizeof(int), a);
    status = status != 0 ? status : launch(s, vote_kernel, slots, warps, 0, a);
    constexpr int THREADS = 256;
    return status != 0 ? status
                       : launch(s, finish_kernel, dim3((unsigned) divided_up(a.n_chunks, THREADS)), dim3(THREADS), 0,
                                a.sums, a.n_chunks, a.votes);
}

} // namespace actqkv::cuda
