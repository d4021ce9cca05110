// The inner loops of ops.h over the vectors of simd.h. Included once per instruction set; everything is static.
#pragma once

#include "ops.h"
#include "rows.h"
#include "simd.h"

// What the compiler keeps in registers depends on these loops being unrolled: all bounds are template arguments.
#define UNROLL _Pragma("GCC unroll 16")
#define LOOP _Pragma("GCC unroll 1") // where sums of all turns at once would not fit the registers

constexpr int64_t LINE_BYTES = 64; // of every cache

// ---- streams: each row is read once from memory

static void simd_to_f16(const float * src, actqkv_f16 * dst, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        v_store_f16(dst + i, v_load(src + i));
    }
    for (; i < n; i++) {
        dst[i] = float_to_half(src[i]);
    }
}

static void simd_add_f16(const actqkv_f16 * row, float * acc, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        v_store(acc + i, v_add(v_load(acc + i), v_load_f16(row + i)));
    }
    for (; i < n; i++) {
        acc[i] += half_to_float(row[i]);
    }
}

// The lines that hold n_bytes, for what will be read soon; into which cache depends on the processor (ops.h). FETCHES: what only
// fetches and is not inlined at once, GCC takes to be without effect, and leaves out.
#define FETCHES __attribute__((always_inline))
FETCHES static inline void fetch(const uint8_t * from, int64_t n_bytes) {
    const uint8_t * end = from + n_bytes;
    from -= (uintptr_t) from % LINE_BYTES;
    if (actqkv::fetches_to_first) {
        for (; from < end; from += LINE_BYTES) {
            __builtin_prefetch(from, 0, 3);
        }
    } else {
        for (; from < end; from += LINE_BYTES) {
            __builtin_prefetch(from, 0, 2);
        }
    }
}

// How rows of a type are read (rows.h): STEP values at a time, from multiples of STEP on, and REST more where a row ends
// with half a block. load<N>: N vectors from there on; load_at: the vector at value e, any multiple of W.
struct f16_rows {
    static constexpr int STEP = W, REST = 0;
    static int64_t bytes(int64_t n) { return 2 * n; }
    template <int N> static inline void load(const uint8_t * from, vf * x) {
        UNROLL
        for (int j = 0; j < N; j++) {
            x[j] = v_load_f16((const uint16_t *) from + j * W);
        }
    }
    static inline vf load_at(const uint8_t * row, int64_t e) { return v_load_f16((const uint16_t *) row + e); }
};

struct q8_rows {
    static constexpr int STEP = actqkv::BLOCK, REST = actqkv::HALF_BLOCK;
    static int64_t bytes(int64_t n) { return (n + actqkv::BLOCK - 1) / actqkv::BLOCK * actqkv::Q8_BYTES; }
    template <int N> static inline void load(const uint8_t * from, vf * x) {
        UNROLL
        for (int j = 0; j < N; j++) {
            const uint8_t * block = from + j * W / actqkv::BLOCK * actqkv::Q8_BYTES;
            x[j] = v_mul(v_load_i8(block + 2 + j * W % actqkv::BLOCK), v_set1(v_half(block)));
        }
    }
    static inline vf load_at(const uint8_t * row, int64_t e) {
        const uint8_t * block = row + e / actqkv::BLOCK * actqkv::Q8_BYTES;
        return v_mul(v_load_i8(block + 2 + e % actqkv::BLOCK), v_set1(v_half(block)));
    }
};

struct q4_rows {
    static constexpr int STEP = actqkv::BLOCK, REST = actqkv::HALF_BLOCK;
    static int64_t bytes(int64_t n) { return (n + actqkv::BLOCK - 1) / actqkv::BLOCK * actqkv::Q4_BYTES; }
    template <int N> static inline void load(const uint8_t * from, vf * x) {
        UNROLL
        for (int j = 0; j < N; j++) {
            x[j] = of_block(from + j * W / actqkv::BLOCK * actqkv::Q4_BYTES, j * W % actqkv::BLOCK);
        }
    }
    static inline vf load_at(const uint8_t * row, int64_t e) {
        return of_block(row + e / actqkv::BLOCK * actqkv::Q4_BYTES, (int) (e % actqkv::BLOCK));
    }
    static inline vf of_block(const uint8_t * block, int i) {
        const vf q = v_load_i4(block + 2 + i % actqkv::HALF_BLOCK, i >= actqkv::HALF_BLOCK);
        return v_mul(q, v_set1(v_half(block)));
    }
};

// acc += the products of N vectors from value e on
template <class R, int NR, int NV, int N>
static inline void dots_step(const float * vecs, const uint8_t * const * row, int64_t e, int64_t width, vf * acc) {
    UNROLL
    for (int i = 0; i < NR; i++) {
        vf k[N];
        R::template load<N>(row[i] + R::bytes(e), k);
        UNROLL
        for (int j = 0; j < N; j++) {
            UNROLL
            for (int x = 0; x < NV; x++) {
                acc[NR * x + i] = v_fma(v_load(vecs + x * width + e + j * W), k[j], acc[NR * x + i]);
            }
        }
    }
}

// NR rows times NV vectors, NR*NV <= W: one tree of shuffles then adds up the lanes of all sums at once. Lane NR*x + i
// of the result has row i times vector x.
template <class R, int NR, int NV>
static inline vf dots_block(const float * vecs, const uint8_t * const * row, int64_t width) {
    vf acc[W];
    UNROLL
    for (int i = 0; i < W; i++) {
        acc[i] = v_zero();
    }
    int64_t e = 0;
    for (; e + R::STEP <= width; e += R::STEP) {
        dots_step<R, NR, NV, R::STEP / W>(vecs, row, e, width, acc);
    }
    if constexpr (R::REST > 0) {
        if (e < width) {
            dots_step<R, NR, NV, R::REST / W>(vecs, row, e, width, acc);
            e += R::REST;
        }
    }
    if (e == width) {
        return v_sum_each(acc);
    }
    float sums[W]; // a ragged end of f16: rare, and kept apart from the registers above
    v_store(sums, v_sum_each(acc));
    for (; e < width; e++) {
        for (int i = 0; i < NR * NV; i++) {
            sums[i] += vecs[i / NR * width + e] * half_to_float(((const uint16_t *) row[i % NR])[e]);
        }
    }
    return v_load(sums);
}

// NV vectors; where rows run out, the block's first row stands in for the missing ones.
template <class R, int NR, int NV> static void dots_rows(const float * vecs, const uint8_t * rows, int64_t n,
                                                         int64_t width, float * out, int64_t ldo,
                                                         const uint8_t * ahead) {
    const int64_t bytes = R::bytes(width);
    for (int64_t b = 0; b < n; b += NR) {
        const int n_row = n - b < NR ? (int) (n - b) : NR;
        const uint8_t * row[NR];
        UNROLL
        for (int i = 0; i < NR; i++) {
            row[i] = rows + (b + (i < n_row ? i : 0)) * bytes;
        }
        if (ahead) {
            fetch(ahead + b * bytes, n_row * bytes);
        }
        float sums[W];
        v_store(sums, dots_block<R, NR, NV>(vecs, row, width));
        for (int x = 0; x < NV; x++) {
            if (n_row == NR) {
                memcpy(out + x * ldo + b, sums + NR * x, NR * sizeof(float));
            } else {
                for (int i = 0; i < n_row; i++) {
                    out[x * ldo + b + i] = sums[NR * x + i];
                }
            }
        }
    }
}

// A few rows at a time pass all vectors, so that those after the first find them in the first-level cache.
template <class R> static void simd_dots(const float * vecs, int n_vec, const void * rows, int64_t n, int64_t width,
                                         float * out, int64_t ldo, const void * ahead) {
    const int64_t bytes = R::bytes(width);
    const int64_t step = n_vec > STREAM_VECS ? 32 : n;
    for (int64_t b = 0; b < n; b += step) {
        const int64_t n_row = n - b < step ? n - b : step;
        const uint8_t * from = (const uint8_t *) rows + b * bytes;
        const uint8_t * next = ahead ? (const uint8_t *) ahead + b * bytes : nullptr;
        for (int x = 0; x < n_vec; x += STREAM_VECS) {
            const float * v = vecs + x * width;
            float * o = out + x * ldo + b;
            switch (n_vec - x < STREAM_VECS ? n_vec - x : STREAM_VECS) {
            case 1:
                dots_rows < R, W<8 ? W : 8, 1>(v, from, n_row, width, o, ldo, next);
                break;
            case 2:
                dots_rows < R, STREAM_VECS < 2 ? W : W / 2, STREAM_VECS<2 ? 1 : 2>(v, from, n_row, width, o, ldo, next);
                break;
            case 3:
                dots_rows < R, 4, STREAM_VECS<3 ? STREAM_VECS : 3>(v, from, n_row, width, o, ldo, next);
                break;
            default:
                dots_rows<R, W / STREAM_VECS, STREAM_VECS>(v, from, n_row, width, o, ldo, next);
                break;
            }
            next = nullptr; // fetched once
        }
    }
}

// The greatest product of n rows with each of NV vectors, W/NV rows at a time.
template <class R, int NV> static void greatest_rows(const float * vecs, const uint8_t * rows, int64_t n, int64_t width,
                                                     float * best, const uint8_t * ahead) {
    constexpr int NR = W / NV;
    const int64_t bytes = R::bytes(width);
    vf most = v_set1(-__builtin_inff());
    for (int64_t b = 0; b < n; b += NR) {
        const uint8_t * row[NR];
        UNROLL
        for (int i = 0; i < NR; i++) {
            row[i] = rows + (b + i < n ? b + i : b) * bytes;
        }
        if (ahead) {
            fetch(ahead + b * bytes, (n - b < NR ? n - b : NR) * bytes);
        }
        most = v_max(most, dots_block<R, NR, NV>(vecs, row, width));
    }
    float each[W];
    v_store(each, most);
    for (int x = 0; x < NV; x++) {
        best[x] = each[NR * x];
        for (int i = 1; i < NR; i++) {
            best[x] = each[NR * x + i] > best[x] ? each[NR * x + i] : best[x];
        }
    }
}

template <class R> static void simd_greatest(const float * queries, int n_vec, const void * rows, int64_t n,
                                             int64_t width, float * best, const void * ahead) {
    constexpr int PAIR = STREAM_VECS < 2 ? STREAM_VECS : 2;
    const uint8_t *from = (const uint8_t *) rows, *next = (const uint8_t *) ahead;
    for (int x = 0; x < n_vec; next = nullptr) { // fetched once
        const float * v = queries + x * width;
        if (n_vec - x >= STREAM_VECS) {
            greatest_rows<R, STREAM_VECS>(v, from, n, width, best + x, next);
            x += STREAM_VECS;
        } else if (n_vec - x >= PAIR) {
            greatest_rows<R, PAIR>(v, from, n, width, best + x, next);
            x += PAIR;
        } else {
            greatest_rows<R, 1>(v, from, n, width, best + x, next);
            x++;
        }
    }
}

// NX sums of NE vectors stay in registers while n rows pass.
template <class R, int NX, int NE> static inline void mix_block(const float * weights, int64_t ldw,
                                                                const uint8_t * rows, int64_t n, int64_t row_bytes,
                                                                float * out, int64_t ldo, const uint8_t * ahead) {
    vf acc[NX][NE];
    UNROLL
    for (int x = 0; x < NX; x++) {
        UNROLL
        for (int j = 0; j < NE; j++) {
            acc[x][j] = v_load(out + x * ldo + j * W);
        }
    }
    for (int64_t b = 0; b < n; b++) {
        vf v[NE];
        R::template load<NE>(rows + b * row_bytes, v);
        if (ahead) {
            fetch(ahead + b * row_bytes, R::bytes(NE * W));
        }
        UNROLL
        for (int x = 0; x < NX; x++) {
            const vf w = v_set1(weights[x * ldw + b]);
            UNROLL
            for (int j = 0; j < NE; j++) {
                acc[x][j] = v_fma(w, v[j], acc[x][j]);
            }
        }
    }
    UNROLL
    for (int x = 0; x < NX; x++) {
        UNROLL
        for (int j = 0; j < NE; j++) {
            v_store(out + x * ldo + j * W, acc[x][j]);
        }
    }
}

// Accumulators are 4*4, or 8 where there are 16 registers: of f16 four sums, which read a row once for all, of two vectors.
template <class R> constexpr bool MIXES_STRIPS = W == 8 && R::STEP == W;
template <class R> constexpr int MIX_VECS = W == 8 && !MIXES_STRIPS<R> ? 2 : 4;
template <class R> constexpr int MIX_WIDTH = MIXES_STRIPS<R> ? 2 : R::STEP / W > 4 ? R::STEP / W : 4;

template <class R, int NE> static void mix_columns(const float * weights, int64_t ldw, int n_vec, const uint8_t * rows,
                                                   int64_t n, int64_t row_bytes, float * out, int64_t ldo,
                                                   const uint8_t * ahead) {
    for (int x = 0; x < n_vec; x += MIX_VECS<R>) {
        const float * w = weights + x * ldw;
        float * o = out + x * ldo;
        switch (n_vec - x < MIX_VECS<R> ? n_vec - x : MIX_VECS<R>) {
        case 1:
            mix_block<R, 1, NE>(w, ldw, rows, n, row_bytes, o, ldo, ahead);
            break;
        case 2:
            mix_block<R, 2, NE>(w, ldw, rows, n, row_bytes, o, ldo, ahead);
            break;
        case 3:
            mix_block<R, (MIX_VECS<R> < 3 ? MIX_VECS<R> : 3), NE>(w, ldw, rows, n, row_bytes, o, ldo, ahead);
            break;
        default:
            mix_block<R, MIX_VECS<R>, NE>(w, ldw, rows, n, row_bytes, o, ldo, ahead);
            break;
        }
        ahead = nullptr; // fetched once
    }
}

// Columns from e on, NE vectors at a time; returns where it stopped.
template <class R, int NE> static int64_t mix_from(const float * weights, int64_t ldw, int n_vec, const uint8_t * rows,
                                                   int64_t n, int64_t width, float * out, int64_t ldo,
                                                   const uint8_t * ahead, int64_t e) {
    for (; e + NE * W <= width; e += NE * W) {
        const int64_t at = R::bytes(e);
        mix_columns<R, NE>(weights, ldw, n_vec, rows + at, n, R::bytes(width), out + e, ldo,
                           ahead ? ahead + at : nullptr);
    }
    return e;
}

template <class R> static void simd_mix(const float * weights, int64_t ldw, int n_vec, const void * rows, int64_t n,
                                        int64_t width, float * out, int64_t ldo, const void * ahead) {
    const uint8_t *from = (const uint8_t *) rows, *next = (const uint8_t *) ahead;
    int64_t e = mix_from<R, MIX_WIDTH<R>>(weights, ldw, n_vec, from, n, width, out, ldo, next, 0);
    e = mix_from<R, R::STEP / W>(weights, ldw, n_vec, from, n, width, out, ldo, next, e);
    if constexpr (R::REST > 0) {
        e = mix_from<R, R::REST / W>(weights, ldw, n_vec, from, n, width, out, ldo, next, e);
    }
    for (; e < width; e++) { // a ragged end of f16
        for (int x = 0; x < n_vec; x++) {
            for (int64_t b = 0; b < n; b++) {
                out[x * ldo + e] += weights[x * ldw + b] * half_to_float(((const uint16_t *) rows)[b * width + e]);
            }
        }
    }
}

// ---- panels: register-blocked matrix products in f32

constexpr int TILE_ROWS = 6;
constexpr int TILE_COLUMNS = TILE_VECTORS * W;

// acc[i][j] += sum_k a[i*lda + k] * b[k*ldb + j] for NR rows and NV vectors of columns, in registers
template <int NR, int NV> __attribute__((always_inline)) static inline void
multiply(const float * a, int64_t lda, const float * b, int64_t ldb, int64_t n_k, vf (&acc)[NR][NV]) {
    for (int64_t k = 0; k < n_k; k++) {
        vf x[NV];
        UNROLL
        for (int j = 0; j < NV; j++) {
            x[j] = v_load(b + k * ldb + j * W);
        }
        UNROLL
        for (int i = 0; i < NR; i++) {
            const vf y = v_set1(a[i * lda + k]);
            UNROLL
            for (int j = 0; j < NV; j++) {
                acc[i][j] = v_fma(y, x[j], acc[i][j]);
            }
        }
    }
}

// The same in memory: c[i*ldc + j] is what is added to, or becomes the product.
template <int NR, int NV, bool ADD> static inline void tile(const float * a, int64_t lda, const float * b, int64_t ldb,
                                                            int64_t n_k, float * c, int64_t ldc) {
    vf acc[NR][NV];
    UNROLL
    for (int i = 0; i < NR; i++) {
        UNROLL
        for (int j = 0; j < NV; j++) {
            acc[i][j] = ADD ? v_load(c + i * ldc + j * W) : v_zero();
        }
    }
    multiply(a, lda, b, ldb, n_k, acc);
    UNROLL
    for (int i = 0; i < NR; i++) {
        UNROLL
        for (int j = 0; j < NV; j++) {
            v_store(c + i * ldc + j * W, acc[i][j]);
        }
    }
}

template <int NV, bool ADD> static void tile_column(const float * a, int64_t lda, int n_rows, const float * b,
                                                    int64_t ldb, int64_t n_k, float * c, int64_t ldc) {
    int i = 0;
    for (; i + TILE_ROWS <= n_rows; i += TILE_ROWS) {
        tile<TILE_ROWS, NV, ADD>(a + i * lda, lda, b, ldb, n_k, c + i * ldc, ldc);
    }
    a += i * lda;
    c += i * ldc;
    switch (n_rows - i) {
    case 1:
        tile<1, NV, ADD>(a, lda, b, ldb, n_k, c, ldc);
        break;
    case 2:
        tile<2, NV, ADD>(a, lda, b, ldb, n_k, c, ldc);
        break;
    case 3:
        tile<3, NV, ADD>(a, lda, b, ldb, n_k, c, ldc);
        break;
    case 4:
        tile<4, NV, ADD>(a, lda, b, ldb, n_k, c, ldc);
        break;
    case 5:
        tile<5, NV, ADD>(a, lda, b, ldb, n_k, c, ldc);
        break;
    default:
        break;
    }
}

// Sub-panel s of the K panel holds columns [s*TILE_COLUMNS, ...) as [d][TILE_COLUMNS].
template <class R> static void simd_pack_k(const void * keys, int n, int d, float * panel, int column) {
    const int64_t row = R::bytes(d);
    for (int j = 0; j < n;) {
        const int c = column + j, n_here = n - j >= W && c % W == 0 ? W : 1; // keys at a time
        float * dst = panel + (int64_t) (c / TILE_COLUMNS) * TILE_COLUMNS * d + c % TILE_COLUMNS;
        const uint8_t * src = (const uint8_t *) keys + j * row;
        int e = 0;
        for (; e + W <= d && n_here == W; e += W) {
            vf x[W];
            UNROLL
            for (int i = 0; i < W; i++) {
                x[i] = R::load_at(src + i * row, e);
            }
            v_transpose(x);
            UNROLL
            for (int i = 0; i < W; i++) {
                v_store(dst + (int64_t) (e + i) * TILE_COLUMNS, x[i]);
            }
        }
        for (; e + W <= d; e += W) {
            float x[W];
            v_store(x, R::load_at(src, e));
            UNROLL
            for (int i = 0; i < W; i++) {
                dst[(int64_t) (e + i) * TILE_COLUMNS] = x[i];
            }
        }
        for (; e < d; e++) { // a ragged end of f16
            for (int i = 0; i < n_here; i++) {
                dst[(int64_t) e * TILE_COLUMNS + i] = half_to_float(((const uint16_t *) (src + i * row))[e]);
            }
        }
        j += n_here;
    }
}

static void simd_logits(const float * q, int n_rows, int d, const float * k_panel, float * logits, int64_t ldl) {
    for (int c = 0; c < actqkv::N_PANEL; c += TILE_COLUMNS) {
        tile_column<TILE_VECTORS, false>(q, d, n_rows, k_panel + (int64_t) c * d, TILE_COLUMNS, d, logits + c, ldl);
    }
}

// Columns of a sub-panel of V: as equal as possible (80 is 48 + 32, not 64 + 16), so that no tile is too narrow.
static inline int value_columns(int d_pad) {
    const int n_sub = (d_pad + TILE_COLUMNS - 1) / TILE_COLUMNS;
    return ((d_pad + n_sub - 1) / n_sub + W - 1) / W * W;
}

// Sub-panel at column e of the V panel holds its columns as [N_PANEL][value_columns, fewer in the last].
template <class R> static void simd_pack_v(const void * values, int n, int d, int d_pad, float * panel, int row) {
    const int step = value_columns(d_pad);
    for (int e0 = 0; e0 < d_pad; e0 += step) {
        const int width = d_pad - e0 < step ? d_pad - e0 : step;
        for (int j = 0; j < n; j++) {
            float * dst = panel + (int64_t) e0 * actqkv::N_PANEL + (int64_t) (row + j) * width;
            const uint8_t * src = (const uint8_t *) values + j * R::bytes(d);
            for (int e = 0; e < width; e += W) {
                const int valid = d - e0 - e; // less than W at a ragged end of f16 only
                v_store(dst + e,
                        valid >= W ? R::load_at(src, e0 + e) : v_load_f16_n((const uint16_t *) src + e0 + e, valid));
            }
        }
    }
}

static void simd_values(const float * weights, int64_t ldw, int n_rows, const float * v_panel, int n, int d_pad,
                        float * out, int64_t ldo) {
    const int step = value_columns(d_pad);
    for (int e = 0; e < d_pad; e += step) {
        const int width = d_pad - e < step ? d_pad - e : step;
        const float * v = v_panel + (int64_t) e * actqkv::N_PANEL;
        switch (width / W) {
        case 1:
            tile_column<1, true>(weights, ldw, n_rows, v, width, n, out + e, ldo);
            break;
        case 2:
            tile_column<2, true>(weights, ldw, n_rows, v, width, n, out + e, ldo);
            break;
        case 3:
            tile_column<3, true>(weights, ldw, n_rows, v, width, n, out + e, ldo);
            break;
        default:
            tile_column<4, true>(weights, ldw, n_rows, v, width, n, out + e, ldo);
            break;
        }
    }
}
