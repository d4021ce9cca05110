// attend for a window of queries, on the tensor cores: flash attention (Dao 2023) over the tiles of the spans.
//
// A block takes N_ROWS rows of one KV head, a row being one query of one of its group's heads: all of a group share each
// tile. Products are of f16 with f32 sums, which would round queries and weights to 11 bits; so each is split in two
// halves, x = high + low, and multiplied twice: about 22 bits. A mixed tile is met twice, each time by the queries that
// the pass is for; the online softmax does not mind the order.
//
// How mma.m16n8k16 lays out its matrices over a warp (PTX manual): with row = lane/4 and column = lane%4*2,
//     A (16 x 16)  {row, column..+1}  {row + 8, column..+1}  {row, column + 8..+9}  {row + 8, column + 8..+9}
//     B (16 x 8)   {column..+1, row}  {column + 8..+9, row}                        (k, n)
//     C (16 x 8)   {row, column}  {row, column + 1}  {row + 8, column}  {row + 8, column + 1}
// so that the weights, a C, are an A again.
#include "attend.cuh"

#include <cmath>

namespace actqkv::cuda {
namespace {

// c += a b
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    emulated_mma(c, a, b0, b1);
#endif
}

__device__ uint32_t pack(uint16_t first, uint16_t second) { return (uint32_t) second << 16 | first; }

// x = high + low, in pairs.
__device__ void split(float x, float y, uint32_t & high, uint32_t & low) {
    const uint16_t hx = narrow(x), hy = narrow(y);
    high = pack(hx, hy);
    low = pack(narrow(x - wide(hx)), narrow(y - wide(hy)));
}

__device__ uint32_t pair_at(const uint16_t * halfs) { return *reinterpret_cast<const uint32_t *>(halfs); }

// D: channels, padded to a multiple of 16. Rows of halfs in shared memory are PAD longer than they need to be: then the
// 32 words that a warp reads at once lie in 32 banks.
template <int D> struct shape {
    static constexpr int PAD = 8;
    static constexpr int N_WARPS = D <= 128 ? 4 : 2; // shared memory of 99 KiB per block is all that sm_86 has
    static constexpr int N_ROWS = 16 * N_WARPS, N_THREADS = WARP * N_WARPS;
    static constexpr int ROW = D + PAD, COLUMN = TILE + PAD;
    static constexpr size_t BYTES = sizeof(uint16_t) * ((2 * N_ROWS + TILE) * ROW + D * COLUMN);
};

template <int D> struct shared_memory {
    uint16_t *q_high, *q_low; // [N_ROWS][ROW]
    uint16_t * keys;          // [TILE][ROW]
    uint16_t * values;        // [D][COLUMN]: transposed, for B
};

template <int D>
__device__ void load_queries(const attention & a, query which, int g, int row0, shared_memory<D> & to) {
    const float * queries = queries_of(a, which);
    for (int i = (int) threadIdx.x; i < shape<D>::N_ROWS * D / 2; i += shape<D>::N_THREADS) {
        const int row = i / (D / 2), e = i % (D / 2) * 2, at = (row0 + row) / a.r;
        const float * q = queries + ((int64_t) at * a.n_head + g * a.r + (row0 + row) % a.r) * a.d + e;
        const float x = at < a.m && e < a.d ? q[0] : 0, y = at < a.m && e + 1 < a.d ? q[1] : 0;
        uint32_t high, low;
        split(x, y, high, low);
        *reinterpret_cast<uint32_t *>(to.q_high + row * shape<D>::ROW + e) = high;
        *reinterpret_cast<uint32_t *>(to.q_low + row * shape<D>::ROW + e) = low;
    }
}

// Keys and values of a tile; zeros behind its last key and its last channel.
template <int D>
__device__ void load_tile(const attention & a, const tile & t, bool near, int g, shared_memory<D> & to) {
    const int64_t row = row_bytes(t.type, a.d);
    const uint8_t * keys = keys_of(t, near, g);
    const uint8_t * values = t.v + g * t.v_stride;
    for (int i = (int) threadIdx.x; i < TILE / 2 * (D / PIECE); i += shape<D>::N_THREADS) {
        const int j = i % (TILE / 2) * 2, e = i / (TILE / 2) * PIECE;
        float one[PIECE], two[PIECE];
        for (int odd = 0; odd < 2; odd++) {
            // A limit of 0 channels reads nothing and gives zeros.
            read_piece(t.type, t.aligned, keys + (j + odd) * row, e, j + odd < t.n ? a.d : 0, one);
            for (int x = 0; x < PIECE; x += 2) {
                *reinterpret_cast<uint32_t *>(to.keys + (j + odd) * shape<D>::ROW + e + x) =
                    pack(narrow(one[x]), narrow(one[x + 1]));
            }
        }
        read_piece(t.type, t.aligned, values + j * row, e, j < t.n ? a.d : 0, one);
        read_piece(t.type, t.aligned, values + (j + 1) * row, e, j + 1 < t.n ? a.d : 0, two);
        for (int x = 0; x < PIECE; x++) {
            *reinterpret_cast<uint32_t *>(to.values + (e + x) * shape<D>::COLUMN + j) =
                pack(narrow(one[x]), narrow(two[x]));
        }
    }
}

constexpr int N_KEY_TILES = TILE / 8, N_KEY_STEPS = TILE / 16;

// logits [16 rows of this warp][TILE], as C.
template <int D>
__device__ void make_logits(const shared_memory<D> & at, float scale, float (&logits)[N_KEY_TILES][4]) {
    constexpr int ROW = shape<D>::ROW;
    const int lane = (int) threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    const int first = (int) threadIdx.x / WARP * 16 + row;
#pragma unroll
    for (int n = 0; n < N_KEY_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            logits[n][i] = 0;
        }
    }
#pragma unroll
    for (int e = 0; e < D; e += 16) {
        const int one = first * ROW + e + column, two = one + 8 * ROW;
        const uint32_t high[4] = {pair_at(at.q_high + one), pair_at(at.q_high + two), pair_at(at.q_high + one + 8),
                                  pair_at(at.q_high + two + 8)};
        const uint32_t low[4] = {pair_at(at.q_low + one), pair_at(at.q_low + two), pair_at(at.q_low + one + 8),
                                 pair_at(at.q_low + two + 8)};
#pragma unroll
        for (int n = 0; n < N_KEY_TILES; n++) {
            const uint16_t * key = at.keys + (n * 8 + row) * ROW + e + column;
            const uint32_t b0 = pair_at(key), b1 = pair_at(key + 8);
            multiply(logits[n], high, b0, b1);
            multiply(logits[n], low, b0, b1);
        }
    }
#pragma unroll
    for (int n = 0; n < N_KEY_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            logits[n][i] *= scale;
        }
    }
}

// mixed [16 rows][D] += weights [16 rows][TILE] values, mixed as C and weights as C.
template <int D>
__device__ void mix(const shared_memory<D> & at, const float (&weights)[N_KEY_TILES][4], float (&mixed)[D / 8][4]) {
    const int lane = (int) threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < N_KEY_STEPS; step++) {
        const float (&left)[4] = weights[2 * step], (&right)[4] = weights[2 * step + 1];
        uint32_t high[4], low[4];
        split(left[0], left[1], high[0], low[0]);
        split(left[2], left[3], high[1], low[1]);
        split(right[0], right[1], high[2], low[2]);
        split(right[2], right[3], high[3], low[3]);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const uint16_t * value = at.values + (n * 8 + row) * shape<D>::COLUMN + step * 16 + column;
            const uint32_t b0 = pair_at(value), b1 = pair_at(value + 8);
            multiply(mixed[n], high, b0, b1);
            multiply(mixed[n], low, b0, b1);
        }
    }
}

// grid.x: rows; grid.y: KV heads.
template <int D> __global__ void __launch_bounds__(shape<D>::N_THREADS) window_kernel(attention a) {
    shared_memory<D> at;
    at.q_high = reinterpret_cast<uint16_t *>(dynamic_shared());
    at.q_low = at.q_high + shape<D>::N_ROWS * shape<D>::ROW;
    at.keys = at.q_low + shape<D>::N_ROWS * shape<D>::ROW;
    at.values = at.keys + TILE * shape<D>::ROW;

    const int g = (int) blockIdx.y, row0 = (int) blockIdx.x * shape<D>::N_ROWS;
    const int lane = (int) threadIdx.x % WARP, column = lane % 4 * 2;
    const int row = row0 + (int) threadIdx.x / WARP * 16 + lane / 4; // and row + 8
    const int token[2] = {row / a.r, (row + 8) / a.r};
    const int last = (row0 + shape<D>::N_ROWS - 1) / a.r; // query of this block

    float mixed[D / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            mixed[n][i] = 0;
        }
    }
    int met = -1; // which queries are loaded
    for (int p = 0; p < a.n_passes; p++) {
        const int32_t pass = a.passes[p];
        const tile t = a.tiles[(int64_t) g * a.list_stride + tile_of(pass)];
        const bool near = is_near(t, query_of(pass));
        if (t.kind == OWN && !meets(a, t, near, last, 0)) {
            break; // later than all of the block's queries, and so is what follows
        }
        __syncthreads(); // all have done with the tile before
        if (met != query_of(pass)) {
            met = query_of(pass);
            load_queries<D>(a, query_of(pass), g, row0, at);
        }
        load_tile<D>(a, t, near, g, at);
        __syncthreads();

        float logits[N_KEY_TILES][4];
        make_logits<D>(at, a.scale, logits);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float joint = most[half];
#pragma unroll
            for (int n = 0; n < N_KEY_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = n * 8 + column + i;
                    float & logit = logits[n][2 * half + i];
                    logit = key < t.n && meets(a, t, near, token[half], key) ? logit : -INFINITY;
                    joint = fmaxf(joint, logit);
                }
            }
            joint = max_lanes<4>(joint); // the four lanes of a row
            const float factor = most[half] == -INFINITY ? 0.0f : expf(most[half] - joint);
            most[half] = joint;
            sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                mixed[n][2 * half] *= factor;
                mixed[n][2 * half + 1] *= factor;
            }
#pragma unroll
            for (int n = 0; n < N_KEY_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float & weight = logits[n][2 * half + i];
                    weight = weight == -INFINITY ? 0.0f : expf(weight - joint);
                    sum[half] += weight; // of this lane's keys
                }
            }
        }
        mix<D>(at, logits, mixed);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float total = sum_lanes<4>(sum[half]);
        const int64_t head = (int64_t) token[half] * a.n_head + g * a.r + (row + 8 * half) % a.r;
        if (token[half] >= a.m) {
            continue;
        }
        if (column == 0) {
            a.stats[2 * head] = most[half];
            a.stats[2 * head + 1] = total;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int e = n * 8 + column + i;
                if (e < a.d) {
                    a.out[head * a.d + e] = mixed[n][2 * half + i] / total;
                }
            }
        }
    }
}

template <int D> int32_t run(actqkv_cuda_stream * s, const attention & a) {
    const int64_t n_rows = (int64_t) a.m * a.r;
    return launch(s, window_kernel<D>, dim3((unsigned) divided_up(n_rows, shape<D>::N_ROWS), (unsigned) a.n_head_kv),
                  dim3(shape<D>::N_THREADS), shape<D>::BYTES, a);
}

} // namespace

int32_t attend_window(actqkv_cuda_stream * s, const attention & a) {
    return a.d <= 32    ? run<32>(s, a)
           : a.d <= 64  ? run<64>(s, a)
           : a.d <= 80  ? run<80>(s, a)
           : a.d <= 96  ? run<96>(s, a)
           : a.d <= 128 ? run<128>(s, a)
                        : run<256>(s, a);
}

} // namespace actqkv::cuda
