// attend for a window of several tokens: blocked matrix products in f32, in base 2.
//
// The r*m query rows of a KV head (row = token*r + head) all meet the same keys. Keys are packed to f32 panels of
// N_PANEL keys of one sort; up to N_PANELS of them form a slab, which stays in the outer caches while blocks of rows
// pass over it with full rows of logits in the second-level cache:
//
//     logits = Q K^T     M' = max(M, row max)     w = 2^(logits - M')     L = L 2^(M - M') + sum w     O = O 2^(M - M') + w V
//
// A retrieval window fits one slab, so M and L are final when its weights are at hand and their sums cost one pass.
// The dense method has many slabs: the columns whose weights are summed then lie in the last one where they fit, and
// whatever lies before it is swept a second time (logits only) with the final M and L.
//
// Blocks of rows of all KV heads, in order, are cut into n_threads equal parts. A part that begins inside a KV head
// packs its panels again (about 2 % of the work per head) and adds its weight sums to an array of its own.
#include <math.h>

#include "attend.h"
#include "parallel.h"

namespace actqkv {

constexpr int N_PANELS = 48;            // 3072 keys: 1.5 MB of packed K and V each at d = 128
constexpr int64_t N_LOGITS = 112 << 10; // of a block of rows, 448 KiB: about half of a second-level cache
constexpr int MAX_ROWS = 96, MIN_ROWS = 24, ROW_STEP = 6; // rows of a block; the register tile has 6
constexpr int64_t N_SUMMED = 8192;                        // beyond so many summed columns, parts hold whole KV heads

namespace {

struct panel {
    sort kind;
    bool turned;
    int32_t n;
    int64_t key, position; // of its first key; positions are consecutive where kind is BOTH or WINDOW
    float * k;             // near for NEAR, BOTH and WINDOW, else far
    float * k_far;         // BOTH only
    float * v;
};

struct slab {
    int32_t n = 0;
    int64_t begin = 0, end = 0; // keys
    panel panels[N_PANELS];
};

// What one part works with; see take_part for the sizes.
struct part_memory {
    float * k;      // N_PANELS of [d][N_PANEL]
    float * v;      // N_PANELS of [N_PANEL][d_pad]
    float * logits; // [rows of a block][N_PANELS * N_PANEL]
    float * q_near; // [rows of a block][d], times scale and log2(e)
    float * q_far;
    float * q_turned;
    float * near;    // [rows of a block][N_PANEL], near logits of a panel of sort BOTH
    float * out;     // [r*m][d_pad] O
    float * max;     // [r*m] M
    float * sum;     // [r*m] L
    float * columns; // [N_PANELS * N_PANEL] weights summed over rows
    float * sums;    // [r][summed] weight sums of a KV head that another part owns
    double * mass;   // [n_keys] per span that is not empty; see mass_row
};

struct window {
    const ops & op;
    const actqkv_attend_args & args;
    int32_t r, d, d_pad, n_rows, n_parts, n_panels;
    int64_t n_keys, first_summed;         // first_summed counted in keys; n_keys where no sums are wanted
    int32_t block_rows = 0, n_blocks = 0; // per KV head
    bool one_slab = false;
    part_memory * parts = nullptr;

    int64_t n_summed() const { return n_keys - first_summed; }
    int64_t ldl() const { return (int64_t) n_panels * N_PANEL; }
};

part_memory take_part(const window & w, arena & a) {
    const uint64_t columns = (uint64_t) w.n_panels * N_PANEL;
    part_memory p;
    p.k = a.take<float>(columns * w.d);
    p.v = a.take<float>(columns * w.d_pad);
    p.logits = a.take<float>(N_LOGITS);
    p.q_near = a.take<float>((uint64_t) MAX_ROWS * w.d);
    p.q_far = a.take<float>((uint64_t) MAX_ROWS * w.d);
    p.q_turned = a.take<float>((uint64_t) MAX_ROWS * w.d);
    p.near = a.take<float>(MAX_ROWS * N_PANEL);
    p.out = a.take<float>((uint64_t) w.n_rows * w.d_pad);
    p.max = a.take<float>(w.n_rows);
    p.sum = a.take<float>(w.n_rows);
    p.columns = a.take<float>(columns);
    p.sums = a.take<float>((uint64_t) w.r * min64(w.n_keys, N_SUMMED));
    p.mass = a.take<double>(w.n_keys);
    return p;
}

window window_of(const ops & op, const actqkv_attend_args & args, int64_t n_keys) {
    const int32_t r = args.n_head / args.n_head_kv;
    const int32_t n_panels =
        (int32_t) min64(N_PANELS, n_keys / N_PANEL + 8); // a panel is left unfilled per change of sort
    return {op,         args,           r,        args.d_head, (args.d_head + 15) / 16 * 16,
            r * args.m, args.n_threads, n_panels, n_keys,      n_keys};
}

// ---- panels and slabs

// Fills p from `at` on, up to key `stop`; k and v receive the packed keys unless k is NULL. False at the end.
bool next_panel(const window & w, int32_t g, int64_t stop, cursor & at, panel & p, float * k, float * v) {
    p.n = 0;
    p.k = k;
    p.k_far = k ? k + (int64_t) N_PANEL * w.d : nullptr; // taken only if the panel turns out to be BOTH
    p.v = v;
    while (p.n < N_PANEL && at.key < stop) {
        cursor ahead = at;
        piece x;
        if (!next_piece(w.args, g, min64(N_PANEL - p.n, stop - at.key), ahead, x)) {
            break;
        }
        if (p.n == 0) {
            p.kind = x.kind;
            p.turned = is_turned(x);
            p.key = x.key;
            p.position = x.position;
        } else if (x.kind != p.kind || is_turned(x) != p.turned || (x.kind == BOTH && x.position != p.position + p.n)) {
            break;
        }
        if (k) {
            const row_ops & rows = w.op.of(x.type);
            rows.pack_k(x.kind == FAR ? x.far : x.near, x.n, w.d, p.k, p.n);
            rows.pack_v(x.v, x.n, w.d, w.d_pad, p.v, p.n);
            if (x.kind == BOTH) {
                rows.pack_k(x.far, x.n, w.d, p.k_far, p.n);
            }
        }
        p.n += x.n;
        at = ahead;
    }
    return p.n > 0;
}

bool fits_one_slab(const window & w) {
    cursor at;
    panel p;
    int32_t n = 0;
    while (n <= w.n_panels && next_panel(w, 0, w.n_keys, at, p, nullptr, nullptr)) {
        n += p.kind == BOTH ? 2 : 1;
    }
    return n <= w.n_panels;
}

// Packs the next slab. Where there are several, one begins at the first summed key. False at the end.
bool next_slab(const window & w, const part_memory & mem, int32_t g, cursor & at, slab & s) {
    s.n = 0;
    s.begin = at.key;
    const int64_t stop = !w.one_slab && at.key < w.first_summed ? w.first_summed : w.n_keys;
    const int64_t k_size = (int64_t) N_PANEL * w.d, v_size = (int64_t) N_PANEL * w.d_pad;
    int32_t used = 0; // packed K panels
    while (used < w.n_panels) {
        cursor ahead = at;
        panel & p = s.panels[s.n];
        panel probe; // how many K panels it takes, before anything is written
        if (!next_panel(w, g, stop, ahead, probe, nullptr, nullptr) || (probe.kind == BOTH && used + 2 > w.n_panels)) {
            break;
        }
        next_panel(w, g, stop, at, p, mem.k + used * k_size, mem.v + s.n * v_size);
        used += p.kind == BOTH ? 2 : 1;
        s.n++;
    }
    s.end = at.key;
    return s.n > 0;
}

// ---- a block of rows

struct row_block {
    int32_t first, n; // rows of the KV head
};

void load_queries(const window & w, const part_memory & mem, int32_t g, row_block b) {
    const float scale = w.args.scale * 1.44269504f;
    for (int32_t i = 0; i < b.n; i++) {
        const int32_t row = b.first + i;
        const int64_t from = ((int64_t) (row / w.r) * w.args.n_head + g * w.r + row % w.r) * w.d;
        for (int32_t e = 0; e < w.d; e++) {
            mem.q_near[i * w.d + e] = w.args.q_near[from + e] * scale;
            mem.q_far[i * w.d + e] = w.args.q_far[from + e] * scale;
            mem.q_turned[i * w.d + e] = w.args.q_turned ? w.args.q_turned[from + e] * scale : 0;
        }
    }
}

// The block's first row that sees anything of the panel: the window is causal.
int32_t first_row(const window & w, const panel & p, row_block b) {
    const int64_t row = p.kind == WINDOW ? (p.position - w.args.n_past) * w.r - b.first : 0;
    return (int32_t) min64(max64(row, 0), b.n);
}

void hide(float * row, int64_t from, int64_t to) {
    for (int64_t c = from; c < to; c++) {
        row[c] = -INFINITY;
    }
}

// Far logits for all rows; then for each row the near ones from its first near column on.
void logits_both(const window & w, const part_memory & mem, const panel & p, row_block b, float * l) {
    w.op.logits(mem.q_far, b.n, w.d, p.k_far, l, w.ldl());
    w.op.logits(mem.q_near, b.n, w.d, p.k, mem.near, N_PANEL);
    for (int32_t i = 0; i < b.n; i++) {
        const int64_t query = w.args.n_past + (b.first + i) / w.r;
        for (int64_t c = max64(query - w.args.n_clamp + 1 - p.position, 0); c < N_PANEL; c++) {
            l[i * w.ldl() + c] = mem.near[i * N_PANEL + c];
        }
    }
}

void block_logits(const window & w, const part_memory & mem, const slab & s, row_block b) {
    for (int32_t j = 0; j < s.n; j++) {
        const panel & p = s.panels[j];
        float * l = mem.logits + (int64_t) j * N_PANEL;
        const int32_t skip = first_row(w, p, b);
        if (p.kind == BOTH) {
            logits_both(w, mem, p, b, l);
        } else {
            const float * q = p.turned ? mem.q_turned : p.kind == FAR ? mem.q_far : mem.q_near;
            w.op.logits(q + (int64_t) skip * w.d, b.n - skip, w.d, p.k, l + skip * w.ldl(), w.ldl());
        }
        for (int32_t i = 0; i < b.n; i++) {
            int64_t seen = p.n;
            if (p.kind == WINDOW) {
                seen = min64(max64((b.first + i) / w.r - (p.position - w.args.n_past) + 1, 0), p.n);
            }
            hide(l + i * w.ldl(), seen, N_PANEL);
        }
    }
}

void block_attend(const window & w, const part_memory & mem, const slab & s, row_block b) {
    const int64_t n_columns = (int64_t) s.n * N_PANEL;
    block_logits(w, mem, s, b);
    for (int32_t i = 0; i < b.n; i++) {
        float * l = mem.logits + i * w.ldl();
        float &max = mem.max[b.first + i], &sum = mem.sum[b.first + i];
        const float slab_max = w.op.max(l, n_columns);
        if (slab_max > max) {
            if (s.begin > 0) {
                const float factor = exp2f(max - slab_max);
                sum *= factor;
                w.op.scale(mem.out + (int64_t) (b.first + i) * w.d_pad, w.d_pad, factor);
            }
            max = slab_max;
        }
        sum += w.op.exp2_sum(l, n_columns, max);
    }
    for (int32_t j = 0; j < s.n; j++) {
        const panel & p = s.panels[j];
        const int32_t skip = first_row(w, p, b);
        w.op.values(mem.logits + skip * w.ldl() + (int64_t) j * N_PANEL, w.ldl(), b.n - skip, p.v, p.n, w.d_pad,
                    mem.out + (int64_t) (b.first + skip) * w.d_pad, w.d_pad);
    }
}

// Weights of the last slab, or of a swept one, are in mem.logits: sum them over rows, by head and by column.
void block_sums(const window & w, const part_memory & mem, const slab & s, row_block b, float * sums, int64_t ld_sums,
                bool columns) {
    for (int32_t i = 0; i < b.n; i++) {
        const float * l = mem.logits + i * w.ldl();
        const float factor = 1 / mem.sum[b.first + i];
        float * row = sums ? sums + (b.first + i) % w.r * ld_sums : nullptr;
        for (int32_t j = 0; row && j < s.n; j++) {
            const panel & p = s.panels[j];
            const int64_t before = max64(w.first_summed - p.key, 0);
            if (before >= p.n) {
                continue;
            }
            w.op.add_scaled(row + p.key + before - w.first_summed, l + j * N_PANEL + before, p.n - before, factor);
        }
        if (columns) {
            w.op.add_scaled(mem.columns, l, (int64_t) s.n * N_PANEL, factor);
        }
    }
}

void add_mass(const window & w, const part_memory & mem, const slab & s, double * mass) {
    for (int32_t j = 0; j < s.n && s.panels[j].kind != WINDOW; j++) {
        const panel & p = s.panels[j];
        cursor at = seek(w.args, p.key);
        piece x;
        while (at.key < p.key + p.n && next_piece(w.args, 0, p.key + p.n - at.key, at, x)) {
            mass[x.ordinal] += w.op.sum(mem.columns + j * N_PANEL + (x.key - p.key), x.n);
        }
    }
}

void write_out(const window & w, const part_memory & mem, int32_t g, row_block b) {
    for (int32_t i = 0; i < b.n; i++) {
        const int32_t row = b.first + i;
        const float factor = 1 / mem.sum[row];
        float * out = w.args.out + ((int64_t) (row / w.r) * w.args.n_head + g * w.r + row % w.r) * w.d;
        const float * from = mem.out + (int64_t) row * w.d_pad;
        for (int32_t e = 0; e < w.d; e++) {
            out[e] = from[e] * factor;
        }
    }
}

// ---- a part: blocks [from, to) of rows of one KV head after another

row_block block_at(const window & w, int32_t i) {
    const int32_t first = i * w.block_rows;
    return {first, (int32_t) min64(w.block_rows, w.n_rows - first)};
}

void start_rows(const window & w, const part_memory & mem, row_block b) {
    for (int32_t row = b.first; row < b.first + b.n; row++) {
        mem.max[row] = -INFINITY;
        mem.sum[row] = 0;
    }
    for (int64_t e = (int64_t) b.first * w.d_pad; e < (int64_t) (b.first + b.n) * w.d_pad; e++) {
        mem.out[e] = 0;
    }
}

void clear_columns(const window & w, const part_memory & mem) {
    for (int64_t c = 0; c < w.ldl(); c++) {
        mem.columns[c] = 0;
    }
}

// Logits again, with the final M: for what the first pass could not sum.
void sweep(const window & w, const part_memory & mem, int32_t g, int32_t from, int32_t to, int64_t first_key,
           int64_t end_key, float * sums, int64_t ld_sums, double * mass) {
    cursor at = seek(w.args, first_key);
    slab s;
    while (at.key < end_key && next_slab(w, mem, g, at, s)) {
        clear_columns(w, mem);
        float * wanted = s.end > w.first_summed ? sums : nullptr;
        for (int32_t i = from; i < to; i++) {
            const row_block b = block_at(w, i);
            load_queries(w, mem, g, b);
            block_logits(w, mem, s, b);
            for (int32_t x = 0; x < b.n; x++) {
                w.op.exp2_sum(mem.logits + x * w.ldl(), (int64_t) s.n * N_PANEL, mem.max[b.first + x]);
            }
            block_sums(w, mem, s, b, wanted, ld_sums, mass);
        }
        if (mass) {
            add_mass(w, mem, s, mass);
        }
    }
}

void attend_blocks(const window & w, const part_memory & mem, int32_t g, int32_t from, int32_t to, float * sums,
                   int64_t ld_sums, double * mass) {
    for (int32_t i = from; i < to; i++) {
        start_rows(w, mem, block_at(w, i));
    }
    const bool columns = mass && w.one_slab;
    cursor at;
    slab s;
    bool summed = false; // the weights of the last slab covered all sums asked for
    while (next_slab(w, mem, g, at, s)) {
        const bool last = s.end == w.n_keys;
        summed = last && s.begin <= w.first_summed && !(mass && !w.one_slab);
        clear_columns(w, mem);
        for (int32_t i = from; i < to; i++) {
            const row_block b = block_at(w, i);
            load_queries(w, mem, g, b);
            block_attend(w, mem, s, b);
            if (summed && (sums || columns)) {
                block_sums(w, mem, s, b, sums, ld_sums, columns);
            }
            if (last) {
                write_out(w, mem, g, b);
            }
        }
        if (summed && columns) {
            add_mass(w, mem, s, mass);
        }
    }
    if (!summed && (sums || mass)) {
        sweep(w, mem, g, from, to, mass ? 0 : w.first_summed, w.n_keys, sums, ld_sums, mass);
    }
}

int64_t part_begin(const window & w, int32_t part) {
    if (w.n_summed() > N_SUMMED) {
        return (int64_t) w.args.n_head_kv * part / w.n_parts * w.n_blocks;
    }
    return (int64_t) w.args.n_head_kv * w.n_blocks * part / w.n_parts;
}

void clear_sums(const window & w, float * sums, int64_t ld_sums) {
    for (int32_t x = 0; sums && x < w.r; x++) {
        for (int64_t j = 0; j < w.n_summed(); j++) {
            sums[x * ld_sums + j] = 0;
        }
    }
}

void attend_part(const window & w, int32_t part) {
    const part_memory & mem = w.parts[part];
    for (int64_t s = 0; w.args.span_mass && s < w.n_keys; s++) {
        mem.mass[s] = 0;
    }
    const int64_t begin = part_begin(w, part), end = part_begin(w, part + 1);
    for (int64_t at = begin; at < end;) {
        const int32_t g = (int32_t) (at / w.n_blocks);
        const int64_t g_begin = (int64_t) g * w.n_blocks;
        const int64_t stop = min64(end, g_begin + w.n_blocks);
        // The part that holds a KV head's first block owns its rows of weight_sums.
        const bool owner = at == g_begin;
        float * sums = !w.args.weight_sums ? nullptr
                       : owner             ? w.args.weight_sums + (int64_t) g * w.r * w.args.sum_stride
                                           : mem.sums;
        const int64_t ld_sums = owner ? w.args.sum_stride : w.n_summed();
        clear_sums(w, sums, ld_sums);
        double * mass = w.args.span_mass ? mass_row(w.args, g, owner, mem.mass) : nullptr;
        attend_blocks(w, mem, g, (int32_t) (at - g_begin), (int32_t) (stop - g_begin), sums, ld_sums, mass);
        at = stop;
    }
}

// What the parts summed apart from each other, added in the order of the parts.
void merge_parts(const window & w) {
    for (int32_t part = 0; w.args.weight_sums && part < w.n_parts; part++) {
        const int64_t begin = part_begin(w, part);
        if (begin % w.n_blocks == 0 || begin == part_begin(w, part + 1)) {
            continue;
        }
        float * sums = w.args.weight_sums + begin / w.n_blocks * w.r * w.args.sum_stride;
        for (int32_t x = 0; x < w.r; x++) {
            w.op.add_scaled(sums + x * w.args.sum_stride, w.parts[part].sums + x * w.n_summed(), w.n_summed(), 1);
        }
    }
    const bool per_head = w.args.span_stride > 0;
    merge_mass(
        w.args, w.n_parts,
        [&](int32_t part) { return per_head && part_begin(w, part) % w.n_blocks == 0 ? nullptr : w.parts[part].mass; },
        [&](int32_t part) { return part_begin(w, part) / w.n_blocks; });
}

} // namespace

uint64_t attend_window_scratch(int32_t n_head, int32_t n_head_kv, int32_t d, int32_t m, int64_t n_keys,
                               int32_t n_threads) {
    actqkv_attend_args args = {};
    args.n_head = n_head;
    args.n_head_kv = n_head_kv;
    args.d_head = d;
    args.m = m;
    args.n_threads = n_threads;
    const ops none = {};
    const window w = window_of(none, args, n_keys);
    arena a{nullptr};
    a.take<part_memory>(n_threads);
    for (int32_t part = 0; part < n_threads; part++) {
        take_part(w, a);
    }
    return a.used;
}

void attend_window(const ops & op, const actqkv_attend_args & args) {
    const int64_t n_past_keys = count_past_keys(args, args.n_spans);
    window w = window_of(op, args, n_past_keys + args.m);
    if (args.weight_sums) {
        w.first_summed = args.first_summed < args.n_spans ? count_past_keys(args, args.first_summed) : n_past_keys;
    }
    w.one_slab = fits_one_slab(w);
    const int64_t rows = N_LOGITS / w.ldl() / ROW_STEP * ROW_STEP;
    w.block_rows = (int32_t) min64(max64(rows, MIN_ROWS), MAX_ROWS);
    w.n_blocks = (w.n_rows + w.block_rows - 1) / w.block_rows;

    arena a{(uint8_t *) args.scratch};
    w.parts = a.take<part_memory>(w.n_parts);
    for (int32_t part = 0; part < w.n_parts; part++) {
        w.parts[part] = take_part(w, a);
    }
    clear_mass(args);
    parallel(w.n_parts, [&](int ith, int nth) {
        for (int32_t part = ith; part < w.n_parts; part += nth) {
            attend_part(w, part);
        }
    });
    merge_parts(w);
}

} // namespace actqkv
