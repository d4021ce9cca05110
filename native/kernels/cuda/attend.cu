// attend - one softmax over everything a window sees; formulas: ../cpu/attend.cpp.
//
// Here: cutting the spans into tiles, the room they take, and the sums of weights. attend_one.cu holds the version for
// one query (flash-decoding: the keys are split over the GPU), attend_window.cu the one for more (tensor cores).
#include "attend.cuh"

#include <algorithm>
#include <new>
#include <vector>

namespace actqkv::cuda {
namespace {

struct plan {
    std::vector<tile> tiles;     // [list][n]
    std::vector<int32_t> passes; // of one list
    std::vector<int32_t> firsts; // [n_spans + 1], first tile of each span of one list
    int32_t n_lists;
};

// Keys [from, to) of a run that starts at t, as tiles of one sort.
void cut(const tile & t, int64_t from, int64_t to, sort kind, int d, int most, std::vector<tile> & tiles) {
    const int64_t row = row_bytes(t.type, d);
    for (int64_t j = from; j < to; j += most) {
        tile one = t;
        one.far = t.far && kind != NEAR ? t.far + j * row : nullptr;
        one.near = t.near && kind != FAR ? t.near + j * row : nullptr;
        one.v = t.v + j * row;
        one.first = t.first + j;
        one.column = (int32_t) (t.column + j);
        one.n = (int8_t) std::min<int64_t>(most, to - j);
        one.kind = kind;
        one.aligned = t.type == F16 && d % PIECE == 0 && is_aligned(one.far) && is_aligned(one.near) &&
                      is_aligned(one.v) && (one.far_stride | one.near_stride | one.v_stride) % 16 == 0;
        tiles.push_back(one);
    }
}

void cut_span(const actqkv_attend_args & args, const actqkv_span & span, int32_t column, int most,
              std::vector<tile> & tiles) {
    tile t = {};
    t.far = span.far;
    t.near = span.near;
    t.v = span.v;
    t.far_stride = span.far ? span.far_stride : 0;
    t.near_stride = span.near ? span.near_stride : 0;
    t.v_stride = span.v_stride;
    t.first = span.first;
    t.column = column;
    t.type = (int8_t) span.kv_type;
    const int64_t n = span.n_tok;
    // Before the first of these positions a key is far for every query, from the second on near for every query.
    const int64_t far_end = args.n_past - args.n_clamp + 1, near_begin = args.n_past + args.m - args.n_clamp;
    const int64_t n_far = !span.far ? 0 : !span.near ? n : std::clamp<int64_t>(far_end - span.first, 0, n);
    const int64_t n_not_near = !span.far ? 0 : !span.near ? n : std::clamp<int64_t>(near_begin - span.first, n_far, n);
    cut(t, 0, n_far, FAR, args.d_head, most, tiles);
    cut(t, n_far, n_not_near, MIXED, args.d_head, most, tiles);
    cut(t, n_not_near, n, NEAR, args.d_head, most, tiles);
}

void cut_window(const actqkv_attend_args & args, int32_t column, int most, std::vector<tile> & tiles) {
    tile t = {};
    t.near = (const uint8_t *) args.k_window;
    t.v = (const uint8_t *) args.v_window;
    t.near_stride = t.v_stride = args.window_stride * (int64_t) sizeof(actqkv_f16);
    t.first = args.n_past;
    t.column = column;
    t.type = F16;
    cut(t, 0, args.m, OWN, args.d_head, most, tiles);
}

plan make_plan(const actqkv_attend_args & args) {
    plan p;
    p.n_lists = args.span_stride > 0 ? args.n_head_kv : 1;
    const int most = args.m == 1 ? TILE_ONE : TILE;
    for (int32_t list = 0; list < p.n_lists; list++) {
        int32_t column = 0;
        for (int32_t s = 0; s < args.n_spans; s++) {
            if (list == 0) {
                p.firsts.push_back((int32_t) p.tiles.size());
            }
            const actqkv_span & span = args.spans[list * args.span_stride + s];
            cut_span(args, span, column, most, p.tiles);
            column += span.n_tok;
        }
        if (list == 0) {
            p.firsts.push_back((int32_t) p.tiles.size());
        }
        cut_window(args, column, most, p.tiles);
    }
    const int32_t n = (int32_t) p.tiles.size() / p.n_lists;
    for (const query q : {Q_FAR, Q_TURNED, Q_NEAR}) {
        for (int32_t i = 0; i < n; i++) {
            const tile & t = p.tiles[i];
            const bool has_far = t.kind == FAR || t.kind == MIXED, has_near = t.kind != FAR;
            if ((has_far && met_by(t, false) == q) || (has_near && met_by(t, true) == q)) {
                p.passes.push_back(make_pass(i, q));
            }
        }
    }
    return p;
}

// ---- scratch

struct room {
    tile * tiles; // with passes and firsts behind them, one upload
    int32_t *passes, *firsts;
    uint64_t upload_bytes;
    float *stats, *partial;
    double * masses; // [H][n_tiles]
};

room lay_out(arena & a, uint64_t n_tiles, uint64_t n_lists, uint64_t n_spans, uint64_t n_head, uint64_t d, uint64_t m) {
    room r = {};
    r.tiles = a.take<tile>(n_tiles * n_lists);
    r.passes = a.take<int32_t>(2 * n_tiles);
    r.firsts = a.take<int32_t>(n_spans + 1);
    r.upload_bytes = a.used;
    r.stats = a.take<float>(2 * m * n_head);
    r.partial = a.take<float>(N_SPLITS_MAX * n_head * (d + 2));
    r.masses = a.take<double>(n_head * n_tiles);
    return r;
}

int32_t upload(actqkv_cuda_stream * s, const room & r, const plan & p) {
    uint8_t * bytes = to_send(s, r.upload_bytes);
    const auto put = [&](const void * at, const void * from, size_t n) {
        memcpy(bytes + ((const uint8_t *) at - (const uint8_t *) r.tiles), from, n);
    };
    put(r.tiles, p.tiles.data(), p.tiles.size() * sizeof(tile));
    put(r.passes, p.passes.data(), p.passes.size() * sizeof(int32_t));
    put(r.firsts, p.firsts.data(), p.firsts.size() * sizeof(int32_t));
    return cudaMemcpyAsync(r.tiles, bytes, r.upload_bytes, cudaMemcpyHostToDevice, s->stream);
}

// ---- sums of weights: the logits once more, now that the softmax is known

constexpr int N_SLICES = 4; // of the queries

struct sums {
    attention a;
    float * weight_sums;
    int64_t sum_stride;
    int32_t first_column;
    double * masses;
};

// A block per tile and query head; a thread per key and slice of the queries.
__global__ void sums_kernel(sums o) {
    const attention & a = o.a;
    float * keys = reinterpret_cast<float *>(dynamic_shared()); // [TILE][d + 1]
    __shared__ float parts[N_SLICES][WARP];
    const int h = (int) blockIdx.y, g = h / a.r, key = (int) threadIdx.x % WARP, slice = (int) threadIdx.x / WARP;
    const tile t = a.tiles[(int64_t) g * a.list_stride + blockIdx.x];
    const int64_t row = row_bytes(t.type, a.d);
    const int n_pieces = (a.d + PIECE - 1) / PIECE;
    float sum = 0;
    for (int near = t.kind == FAR || t.kind == MIXED ? 0 : 1; near <= (t.kind == FAR ? 0 : 1); near++) {
        for (int i = (int) threadIdx.x; i < t.n * n_pieces; i += (int) blockDim.x) {
            const int j = i / n_pieces, e = i % n_pieces * PIECE;
            float values[PIECE];
            read_piece(t.type, t.aligned, keys_of(t, near, g) + j * row, e, a.d, values);
            for (int x = 0; x < PIECE && e + x < a.d; x++) {
                keys[j * (a.d + 1) + e + x] = values[x];
            }
        }
        __syncthreads();
        for (int i = slice; i < a.m; i += N_SLICES) {
            if (key < t.n && meets(a, t, near, i, key)) {
                const float * q = queries_of(a, met_by(t, near)) + ((int64_t) i * a.n_head + h) * a.d;
                const float * stats = a.stats + 2 * ((int64_t) i * a.n_head + h);
                float dot = 0;
                for (int e = 0; e < a.d; e++) {
                    dot += q[e] * keys[key * (a.d + 1) + e];
                }
                sum += expf(a.scale * dot - stats[0]) / stats[1];
            }
        }
        __syncthreads();
    }
    parts[slice][key] = sum;
    __syncthreads();
    if (slice != 0) {
        return;
    }
    sum = 0;
    for (int i = 0; i < N_SLICES; i++) {
        sum += parts[i][key];
    }
    const int32_t column = t.column + key - o.first_column;
    if (o.weight_sums != nullptr && key < t.n && column >= 0) {
        o.weight_sums[h * o.sum_stride + column] = sum;
    }
    const float mass = sum_lanes<WARP>(sum);
    if (key == 0) {
        o.masses[(int64_t) h * a.n_tiles + blockIdx.x] = mass;
    }
}

// A thread per span of every list.
__global__ void mass_kernel(sums o, const int32_t * firsts, int32_t n_spans, int64_t span_stride, double * span_mass) {
    const int s = (int) (blockIdx.x * blockDim.x + threadIdx.x), list = (int) blockIdx.y;
    if (s >= n_spans) {
        return;
    }
    const bool per_head = span_stride > 0;
    const int from = per_head ? list * o.a.r : 0, to = per_head ? from + o.a.r : o.a.n_head;
    double mass = 0;
    for (int h = from; h < to; h++) {
        for (int i = firsts[s]; i < firsts[s + 1]; i++) {
            mass += o.masses[(int64_t) h * o.a.n_tiles + i];
        }
    }
    span_mass[list * span_stride + s] = mass / o.a.n_head;
}

int32_t add_sums(actqkv_cuda_stream * s, const sums & o, const actqkv_attend_args & args, const int32_t * firsts,
                 int32_t n_lists) {
    const size_t shared = (size_t) TILE * (o.a.d + 1) * sizeof(float);
    int32_t status =
        launch(s, sums_kernel, dim3((unsigned) o.a.n_tiles, (unsigned) o.a.n_head), dim3(N_SLICES * WARP), shared, o);
    if (status == 0 && args.span_mass != nullptr) {
        constexpr int THREADS = 64;
        status = launch(s, mass_kernel, dim3((unsigned) divided_up(args.n_spans, THREADS), (unsigned) n_lists),
                        dim3(THREADS), 0, o, firsts, args.n_spans, args.span_stride, args.span_mass);
    }
    return status;
}

int32_t run(actqkv_cuda_stream * s, const actqkv_attend_args & args) {
    if (args.d_head < 1 || args.d_head > ACTQKV_CUDA_MAX_D_HEAD || args.m < 1 || args.n_head % args.n_head_kv != 0) {
        return cudaErrorInvalidValue;
    }
    const plan p = make_plan(args);
    const int32_t n_tiles = (int32_t) p.tiles.size() / p.n_lists;
    arena place = {(uint8_t *) args.scratch};
    const room r = lay_out(place, n_tiles, p.n_lists, args.n_spans, args.n_head, args.d_head, args.m);
    int32_t status = cudaSetDevice(s->device);
    status = status != 0 ? status : upload(s, r, p);
    attention a = {};
    a.tiles = r.tiles;
    a.list_stride = p.n_lists > 1 ? n_tiles : 0;
    a.n_tiles = n_tiles;
    a.passes = r.passes;
    a.n_passes = (int32_t) p.passes.size();
    a.n_head = args.n_head;
    a.n_head_kv = args.n_head_kv;
    a.r = args.n_head / args.n_head_kv;
    a.d = args.d_head;
    a.m = args.m;
    a.n_past = args.n_past;
    a.n_clamp = args.n_clamp;
    a.scale = args.scale;
    a.queries[Q_FAR] = args.q_far;
    a.queries[Q_TURNED] = args.q_turned;
    a.queries[Q_NEAR] = args.q_near;
    a.out = args.out;
    a.stats = r.stats;
    a.partial = r.partial;
    status = status != 0 ? status : args.m == 1 ? attend_one(s, a) : attend_window(s, a);
    if (status != 0 || (args.weight_sums == nullptr && args.span_mass == nullptr)) {
        return status;
    }
    int32_t first_column = 0;
    for (int32_t i = 0; i < std::min(args.first_summed, args.n_spans); i++) {
        first_column += args.spans[i].n_tok;
    }
    return add_sums(s, {a, args.weight_sums, args.sum_stride, first_column, r.masses}, args, r.firsts, p.n_lists);
}

} // namespace

uint64_t attend_scratch(int32_t n_head, int32_t, int32_t d_head, int32_t m, int64_t n_keys, int32_t n_spans,
                        int32_t n_lists) {
    // A span is cut in three sorts at most, and each run and the window end in a tile that is not full.
    const uint64_t n_tiles = (uint64_t) n_keys / TILE_ONE + 3 * (uint64_t) n_spans + 1;
    arena measure = {nullptr};
    lay_out(measure, n_tiles, n_lists, n_spans, n_head, d_head, m);
    return measure.used;
}

int32_t attend(actqkv_cuda_stream * s, const actqkv_attend_args * args) {
    try {
        return run(s, *args);
    } catch (const std::bad_alloc &) {
        return cudaErrorMemoryAllocation;
    }
}

} // namespace actqkv::cuda
