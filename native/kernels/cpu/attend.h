// What the scalar and the fast versions of attend share: walking over the keys, and cutting up the scratch.
#pragma once

#include <stdint.h>

#include "ops.h"

namespace actqkv {

// Which query a key meets. Within one span it changes with the position at most from FAR over BOTH to NEAR.
enum sort { FAR, NEAR, BOTH, WINDOW }; // BOTH: far for early queries of the window, near for late ones

// A stretch of keys of one sort and one KV head.
struct piece {
    sort kind;
    int32_t n;
    int64_t key;      // number of its first key, counted over all spans and the window
    int64_t position; // of its first key
    int32_t ordinal;  // of its span among those that are not empty
    int32_t type;     // enum actqkv_kv_type
    const uint8_t * near;
    const uint8_t * far;
    const uint8_t * v;
};

struct cursor {
    int32_t span = 0;
    int32_t offset = 0;
    int32_t ordinal = 0;
    int64_t key = 0;
};

inline bool is_turned(const piece & p) { return p.type != ACTQKV_KV_F16; }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Span s as KV head g has it.
inline const actqkv_span & span_of(const actqkv_attend_args & args, int32_t g, int32_t s) {
    return args.spans[g * args.span_stride + s];
}

// Where the masses of KV head g's spans are summed: with a list per head, the head's owner (the part that holds its
// first keys or rows) adds to the result itself, since all spans have keys and a span's ordinal is its index.
inline double * mass_row(const actqkv_attend_args & args, int32_t g, bool owner, double * own) {
    return args.span_stride > 0 && owner ? args.span_mass + g * args.span_stride : own;
}

inline int64_t count_past_keys(const actqkv_attend_args & args, int32_t n_spans) {
    int64_t n = 0;
    for (int32_t s = 0; s < n_spans; s++) {
        n += args.spans[s].n_tok;
    }
    return n;
}

inline void clear_mass(const actqkv_attend_args & args) {
    for (int64_t g = 0; args.span_mass && g < (args.span_stride > 0 ? args.n_head_kv : 1); g++) {
        for (int32_t s = 0; s < args.n_spans; s++) {
            args.span_mass[g * args.span_stride + s] = 0;
        }
    }
}

// The mean over heads: adds what each part summed for itself, part by part. own(part): its array by ordinal, NULL
// where it summed nothing there; head(part): the KV head that array is of where lists are per head.
template <typename Own, typename Head>
void merge_mass(const actqkv_attend_args & args, int32_t n_parts, Own && own, Head && head) {
    for (int32_t part = 0; args.span_mass && part < n_parts; part++) {
        const double * mass = own(part);
        double * to = args.span_mass + head(part) * args.span_stride;
        for (int32_t s = 0, ordinal = 0; mass && s < args.n_spans; s++) {
            to[s] += args.spans[s].n_tok > 0 ? mass[ordinal++] : 0;
        }
    }
    for (int64_t g = 0; args.span_mass && g < (args.span_stride > 0 ? args.n_head_kv : 1); g++) {
        for (int32_t s = 0; s < args.n_spans; s++) {
            args.span_mass[g * args.span_stride + s] /= args.n_head;
        }
    }
}

inline void step_over(cursor & at, int32_t n) {
    at.offset += n;
    at.key += n;
}

inline void next_span(cursor & at, const actqkv_span & span) {
    at.ordinal += span.n_tok > 0;
    at.span++;
    at.offset = 0;
}

inline cursor seek(const actqkv_attend_args & args, int64_t key) {
    cursor at;
    while (at.span < args.n_spans && key - at.key >= args.spans[at.span].n_tok) {
        at.key += args.spans[at.span].n_tok;
        next_span(at, args.spans[at.span]);
    }
    step_over(at, (int32_t) (key - at.key));
    return at;
}

// At most max_n keys from `at` on, of KV head g; moves `at` behind them. False at the end.
inline bool next_piece(const actqkv_attend_args & args, int32_t g, int64_t max_n, cursor & at, piece & p) {
    const int32_t d = args.d_head;
    while (at.span < args.n_spans && at.offset >= args.spans[at.span].n_tok) {
        next_span(at, args.spans[at.span]);
    }
    p.key = at.key;
    p.ordinal = at.ordinal;
    if (at.span >= args.n_spans) {
        const int64_t offset = g * args.window_stride + (int64_t) at.offset * d;
        p.kind = WINDOW;
        p.type = ACTQKV_KV_F16;
        p.n = (int32_t) min64(args.m - at.offset, max_n);
        p.position = args.n_past + at.offset;
        p.near = (const uint8_t *) (args.k_window + offset);
        p.far = nullptr;
        p.v = (const uint8_t *) (args.v_window + offset);
        step_over(at, p.n);
        return p.n > 0;
    }
    const actqkv_span & s = span_of(args, g, at.span);
    p.n = (int32_t) min64(s.n_tok - at.offset, max_n);
    p.position = s.first + at.offset;
    p.type = s.kv_type;
    const int64_t skip = at.offset * actqkv_row_bytes(s.kv_type, d);
    p.near = s.near ? s.near + g * s.near_stride + skip : nullptr;
    p.far = s.far ? s.far + g * s.far_stride + skip : nullptr;
    p.v = s.v + g * s.v_stride + skip;
    const int64_t far_end = args.n_past - args.n_clamp + 1;         // before it, far for every query
    const int64_t near_begin = args.n_past + args.m - args.n_clamp; // from it on, near for every query
    if (!p.far || (p.near && p.position >= near_begin)) {
        p.kind = NEAR;
    } else if (!p.near) {
        p.kind = FAR;
    } else if (p.position < far_end) {
        p.kind = FAR;
        p.n = (int32_t) min64(p.n, far_end - p.position);
    } else {
        p.kind = BOTH;
        p.n = (int32_t) min64(p.n, near_begin - p.position);
    }
    step_over(at, p.n);
    return true;
}

// Hands out consecutive 64-byte aligned arrays; from NULL it only counts.
struct arena {
    uint8_t * base;
    uint64_t used = 0;

    template <typename T> T * take(uint64_t n) {
        T * p = base ? (T *) (base + used) : nullptr;
        used += (n * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

// Decode (attend_one.cpp) and windows (attend_window.cpp); scratch in bytes for at most n_keys keys and m queries.
void attend_one(const ops & ops, const actqkv_attend_args & args);
void attend_window(const ops & ops, const actqkv_attend_args & args);
uint64_t attend_one_scratch(int32_t n_head, int32_t n_head_kv, int32_t d, int64_t n_keys, int32_t n_threads);
uint64_t attend_window_scratch(int32_t n_head, int32_t n_head_kv, int32_t d, int32_t m, int64_t n_keys,
                               int32_t n_threads);

} // namespace actqkv
