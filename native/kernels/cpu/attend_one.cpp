// attend for a window of one token: every byte of K and V is read once and shared by the r query heads of its group.
//
// The keys of all KV heads, one after another, are cut into n_threads equal parts, so that all threads are busy
// whatever G is. A part holds segments (KV head, range of keys); each segment has its own maximum M, sum L and
// unnormalised output O, in base 2:  w_j = 2^(l_j - M),  L = sum w_j,  O = sum w_j v_j.  Where a KV head lies in
// several parts these are merged:  M* = max M,  L* = sum L 2^(M - M*),  out = sum O 2^(M - M*) / L*.
#include <math.h>

#include "attend.h"
#include "parallel.h"

namespace actqkv {

// Up to so many keys, all weights are kept for the sums at the end; beyond, logits are computed again for those.
constexpr int64_t N_KEPT = 8192;
constexpr int64_t N_BLOCK = 2048; // keys at a time where weights are not kept

namespace {

struct one {
    const ops & op;
    const actqkv_attend_args & args;
    int32_t r, d, n_parts;
    int64_t n_keys, first_summed; // counted in keys
    bool kept;

    float * queries;  // [part][3][r][d] q_near, q_far, q_turned of the current group, times scale and log2(e)
    float * partials; // [part + KV head][r][2 + d] M, L, O of a segment
    float * weights;  // [H][n_keys] if kept, else [part][r][N_BLOCK]
    double * mass;    // [part][n_keys] per span that is not empty; see mass_row

    float * partial(int32_t part, int32_t g, int32_t x) const {
        return partials + ((int64_t) (part + g) * r + x) * (2 + d); // unique: each segment raises one of the two
    }
    int64_t part_begin(int32_t part) const { return n_keys * args.n_head_kv * part / n_parts; }
};

uint64_t lay_out(one & o, uint8_t * base, int64_t n_keys) {
    arena a{base};
    const int32_t n_head = o.args.n_head, n_head_kv = o.args.n_head_kv;
    o.queries = a.take<float>((uint64_t) o.n_parts * 3 * o.r * o.d);
    o.partials = a.take<float>((uint64_t) (o.n_parts + n_head_kv) * o.r * (2 + o.d));
    const uint64_t kept = (uint64_t) n_head * min64(n_keys, N_KEPT), block = (uint64_t) o.n_parts * o.r * N_BLOCK;
    o.weights = a.take<float>(o.kept ? kept : kept > block ? kept : block);
    o.mass = a.take<double>((uint64_t) o.n_parts * n_keys);
    return a.used;
}

void scale_queries(const one & o, int32_t g, float * q) {
    const float scale = o.args.scale * 1.44269504f;
    const int64_t n = (int64_t) o.r * o.d;
    for (int64_t e = 0; e < n; e++) {
        q[e] = o.args.q_near[g * n + e] * scale;
        q[n + e] = o.args.q_far[g * n + e] * scale;
        q[2 * n + e] = o.args.q_turned ? o.args.q_turned[g * n + e] * scale : 0;
    }
}

// weights[x*ldw + j] = base-2 logits of keys [from, to) of KV head g
void logits(const one & o, int32_t g, const float * q, int64_t from, int64_t to, float * weights, int64_t ldw) {
    cursor at = seek(o.args, from);
    piece p, next;
    bool more = next_piece(o.args, g, to - from, at, p);
    while (more) {
        more = at.key < to && next_piece(o.args, g, to - at.key, at, next);
        const uint8_t * k = p.kind == FAR ? p.far : p.near;
        const uint8_t * ahead = !more ? nullptr : next.kind == FAR ? next.far : next.near;
        const float * met = q + (is_turned(p) ? 2 : p.kind == FAR ? 1 : 0) * o.r * o.d;
        o.op.of(p.type).dots(met, o.r, k, p.n, o.d, weights + p.key - from, ldw, ahead);
        p = next;
    }
}

void values(const one & o, int32_t g, int64_t from, int64_t to, const float * weights, int64_t ldw, float * out,
            int64_t ldo) {
    cursor at = seek(o.args, from);
    piece p, next;
    bool more = next_piece(o.args, g, to - from, at, p);
    while (more) {
        more = at.key < to && next_piece(o.args, g, to - at.key, at, next);
        o.op.of(p.type).mix(weights + p.key - from, ldw, o.r, p.v, p.n, o.d, out, ldo, more ? next.v : nullptr);
        p = next;
    }
}

// M, L, O of keys [from, to) of KV head g
void segment(const one & o, int32_t part, int32_t g, int64_t from, int64_t to, const float * q) {
    const int64_t stride = 2 + o.d;
    float * first = o.partial(part, g, 0);
    for (int64_t e = 0; e < o.r * stride; e++) {
        first[e] = e % stride == 0 ? -INFINITY : 0;
    }
    const int64_t step = o.kept ? to - from : N_BLOCK;
    for (int64_t b = from; b < to; b += step) {
        const int64_t n = min64(step, to - b);
        float * w = o.kept ? o.weights + (int64_t) g * o.r * o.n_keys + b : o.weights + (int64_t) part * o.r * N_BLOCK;
        const int64_t ldw = o.kept ? o.n_keys : N_BLOCK;
        logits(o, g, q, b, b + n, w, ldw);
        for (int32_t x = 0; x < o.r; x++) {
            float * state = first + x * stride;
            const float max = o.op.max(w + x * ldw, n);
            if (max > state[0]) {
                o.op.scale(state + 1, 1 + o.d, exp2f(state[0] - max));
                state[0] = max;
            }
            state[1] += o.op.exp2_sum(w + x * ldw, n, state[0]);
        }
        values(o, g, b, b + n, w, ldw, first + 2, stride);
    }
}

// M* and L* of query head x of group g over all parts
void merge(const one & o, int32_t g, int32_t x, float & max, float & sum) {
    max = -INFINITY;
    sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t part = 0; part < o.n_parts; part++) {
            if (o.part_begin(part) < (g + 1) * o.n_keys && o.part_begin(part + 1) > g * o.n_keys) {
                const float * state = o.partial(part, g, x);
                if (pass == 0) {
                    max = state[0] > max ? state[0] : max;
                } else {
                    sum += state[1] * exp2f(state[0] - max);
                }
            }
        }
    }
}

void write_out(const one & o, int32_t g) {
    for (int32_t x = 0; x < o.r; x++) {
        float max, sum;
        merge(o, g, x, max, sum);
        float * out = o.args.out + (int64_t) (g * o.r + x) * o.d;
        for (int32_t e = 0; e < o.d; e++) {
            out[e] = 0;
        }
        for (int32_t part = 0; part < o.n_parts; part++) {
            if (o.part_begin(part) < (g + 1) * o.n_keys && o.part_begin(part + 1) > g * o.n_keys) {
                const float * state = o.partial(part, g, x);
                o.op.add_scaled(out, state + 2, o.d, exp2f(state[0] - max) / sum);
            }
        }
    }
}

// Adds factor * weights of keys [from, to) of query head h to the sums asked for, and to mass unless it is NULL.
void add_sums(const one & o, int32_t h, int64_t from, int64_t to, const float * w, float factor, double * mass) {
    if (o.args.weight_sums) {
        const int64_t begin = max64(from, o.first_summed);
        float * sums = o.args.weight_sums + h * o.args.sum_stride;
        for (int64_t j = begin; j < to; j++) {
            sums[j - o.first_summed] = w[j - from] * factor;
        }
    }
    if (mass) {
        cursor at = seek(o.args, from);
        piece p;
        while (at.key < to && next_piece(o.args, 0, to - at.key, at, p) && p.kind != WINDOW) {
            mass[p.ordinal] += (double) o.op.sum(w + p.key - from, p.n) * factor;
        }
    }
}

void sums(const one & o, int32_t part, int32_t g, int64_t from, int64_t to, const float * q) {
    double * mass = nullptr;
    if (o.args.span_mass) {
        mass = mass_row(o.args, g, from == 0, o.mass + part * o.n_keys);
    } else {
        from = max64(from, o.first_summed);
    }
    const int64_t step = o.kept ? to - from : N_BLOCK;
    for (int64_t b = from; b < to; b += step) {
        const int64_t n = min64(step, to - b);
        float * w = o.kept ? o.weights + (int64_t) g * o.r * o.n_keys + b : o.weights + (int64_t) part * o.r * N_BLOCK;
        const int64_t ldw = o.kept ? o.n_keys : N_BLOCK;
        if (!o.kept) {
            logits(o, g, q, b, b + n, w, ldw);
        }
        for (int32_t x = 0; x < o.r; x++) {
            float max, sum;
            merge(o, g, x, max, sum);
            if (o.kept) {
                sum /= exp2f(o.partial(part, g, x)[0] - max);
            } else {
                o.op.exp2_sum(w + x * ldw, n, max);
            }
            add_sums(o, g * o.r + x, b, b + n, w + x * ldw, 1 / sum, mass);
        }
    }
}

// f(KV head, first key, end) for each segment of a part
template <typename F> void for_segments(const one & o, int32_t part, F && f) {
    const int64_t end = o.part_begin(part + 1);
    for (int64_t at = o.part_begin(part); at < end;) {
        const int32_t g = (int32_t) (at / o.n_keys);
        const int64_t stop = min64(end, (g + 1) * o.n_keys);
        f(g, at - g * o.n_keys, stop - g * o.n_keys);
        at = stop;
    }
}

void finish(const one & o, int32_t part, int32_t g, int64_t from, int64_t to, const float * q) {
    if (from == 0) {
        write_out(o, g);
    }
    if (o.args.weight_sums || o.args.span_mass) {
        sums(o, part, g, from, to, q);
    }
}

} // namespace

uint64_t attend_one_scratch(int32_t n_head, int32_t n_head_kv, int32_t d, int64_t n_keys, int32_t n_threads) {
    actqkv_attend_args args = {};
    args.n_head = n_head;
    args.n_head_kv = n_head_kv;
    const ops none = {};
    one o{none, args, n_head / n_head_kv, d, n_threads, n_keys, 0, false, nullptr, nullptr, nullptr, nullptr};
    return lay_out(o, nullptr, n_keys);
}

void attend_one(const ops & op, const actqkv_attend_args & args) {
    const int64_t n_keys = count_past_keys(args, args.n_spans) + 1;
    const int32_t n_parts = (int32_t) min64(args.n_threads, n_keys * args.n_head_kv); // none of them empty
    const int32_t summed = args.first_summed < args.n_spans ? args.first_summed : args.n_spans;
    one o{op,
          args,
          args.n_head / args.n_head_kv,
          args.d_head,
          n_parts,
          n_keys,
          count_past_keys(args, summed),
          n_keys <= N_KEPT,
          nullptr,
          nullptr,
          nullptr,
          nullptr};
    lay_out(o, (uint8_t *) args.scratch, n_keys);
    const bool whole = args.n_head_kv % o.n_parts == 0; // no KV head lies in two parts: nothing to wait for
    clear_mass(args);

    parallel(o.n_parts, [&](int ith, int nth) {
        for (int32_t part = ith; part < o.n_parts; part += nth) {
            for (int64_t s = 0; args.span_mass && s < n_keys; s++) {
                o.mass[part * n_keys + s] = 0;
            }
            float * q = o.queries + (int64_t) part * 3 * o.r * o.d;
            for_segments(o, part, [&](int32_t g, int64_t from, int64_t to) {
                scale_queries(o, g, q);
                segment(o, part, g, from, to, q);
                if (whole) {
                    finish(o, part, g, from, to, q);
                }
            });
        }
    });
    if (!whole) {
        parallel(o.n_parts, [&](int ith, int nth) {
            for (int32_t part = ith; part < o.n_parts; part += nth) {
                float * q = o.queries + (int64_t) part * 3 * o.r * o.d;
                for_segments(o, part, [&](int32_t g, int64_t from, int64_t to) {
                    scale_queries(o, g, q);
                    finish(o, part, g, from, to, q);
                });
            }
        });
    }
    const bool per_head = args.span_stride > 0;
    merge_mass(
        args, o.n_parts,
        [&](int32_t part) { return per_head && o.part_begin(part) % n_keys == 0 ? nullptr : o.mass + part * n_keys; },
        [&](int32_t part) { return o.part_begin(part) / n_keys; });
}

} // namespace actqkv
