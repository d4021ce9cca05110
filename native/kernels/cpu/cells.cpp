// cells - an index of the keys of a stretch of chunks: those that are alike lie together, sketched in one bit per channel.
//
//     C = n / 64 cells by kmeans.cpp
//     mu_i = mean of the keys of cell i less what all keys have in common, turned (kernels.h), in whole 8ths of its largest
//     reach_i = sqrt(mean over keys and channels of (k_je - mu_ie)^2)
//     m_j = mean_e |k_je - mu_ie|      k'_j = mu + m_j sign(k_j - mu)          a key as its sketch has it
//
// m in whole multiples of the greatest of the cell / 255. Rare keys have a cell of their own, whichever chunk they lie in: that
// is what finds a needle where the mean of its chunk says nothing of it (native/README.md). Cells of about equal size, by
// halving at medians, do not. A stretch that is not divided keeps its keys in order: cells are a chunk, or 32 keys of one.
//
// Cells in the place of an inverted file's: Jegou, Douze and Schmid 2011 (TPAMI). One bit per channel of turned vectors:
// Gao and Long 2024 (SIGMOD). Runs once per stretch: n C d products.
#include "cells.h"

#include <math.h>

#include "kmeans.h"

namespace actqkv {
namespace {

// x [d] of key j, turned.
void load_turned(const ops * op, const kept_keys & keys, int64_t j, int32_t d, float * x) {
    memset(x, 0, d * sizeof(float));
    add_key(op, keys, j, d, x);
    if (keys.type == ACTQKV_KV_F16) {
        actqkv_turn(x, 1, d);
    }
}

// A cell's centre and reach, and the sketches of its keys: order[from .. to) of the stretch.
struct writer {
    const ops * op;
    const kept_keys & keys;
    const float * common; // turned
    int32_t d;
    const int32_t * order; // of keys
    int64_t first_chunk;   // of the stretch, that keys are of
    float * turned;        // [CELL_KEYS_MOST][d] room, for keys less what is common
    stretch_view out;

    // Its keys lie at the sixteen; how many sixteens they take.
    int64_t cell(int64_t i, int64_t from, int64_t to, int64_t sixteen) const {
        const cell_view cell = out.cell(i);
        const int64_t n = to - from;
        float mean[MAX_CHANNELS] = {0};
        for (int64_t k = 0; k < n; k++) {
            float * x = turned + k * d;
            load_turned(op, keys, order[from + k], d, x);
            for (int32_t e = 0; e < d; e++) {
                x[e] -= common[e];
                mean[e] += x[e];
            }
        }
        *cell.place() = (uint32_t) (256 * sixteen + n - 1);
        *cell.step() = round_centre(cell, n, mean);
        sketch_keys(cell, from, n, mean);
        return sixteens(n);
    }

private:
    // The sum of n keys becomes the centre that is kept; its step.
    float round_centre(const cell_view & cell, int64_t n, float * mean) const {
        float extreme = 0;
        for (int32_t e = 0; e < d; e++) {
            mean[e] /= (float) n;
            extreme = fabsf(mean[e]) > fabsf(extreme) ? mean[e] : extreme;
        }
        const float step = isfinite(extreme) ? extreme / -8 : 0, inverse = step != 0 ? 1 / step : 0;
        for (int32_t e = 0; e < d; e++) {
            const float x8 = mean[e] * inverse + 8.5f;
            const int whole = !(x8 > 0) ? 0 : x8 > 15 ? 15 : (int) x8;
            *cell.centre(e) |= (uint8_t) (is_high(e) ? whole << 4 : whole);
            mean[e] = step * (float) (whole - 8);
        }
        return step;
    }

    void sketch_keys(const cell_view & cell, int64_t from, int64_t n, const float * mean) const {
        const int64_t m = 16 * sixteens(n);
        uint8_t *whole = out.keys_of(cell), *chunks = whole + m, *signs = chunks + 2 * m;
        float sizes[CELL_KEYS_MOST], greatest = 0;
        double squares = 0;
        for (int64_t k = 0; k < n; k++) {
            const float * x = turned + k * d;
            sizes[k] = 0;
            for (int32_t e = 0; e < d; e++) {
                const float rest = x[e] - mean[e];
                sizes[k] += fabsf(rest) / (float) d;
                squares += rest * rest;
                signs[e / 8 * m + k] |= (uint8_t) (!(rest < 0) << e % 8);
            }
            greatest = sizes[k] > greatest ? sizes[k] : greatest;
            const uint16_t chunk = (uint16_t) (first_chunk + order[from + k] / keys.c);
            memcpy(chunks + 2 * k, &chunk, sizeof(chunk));
        }
        *cell.reach() = (float) sqrt(squares / ((double) n * d));
        *cell.size() = isfinite(greatest) ? greatest / 255 : 0;
        const float inverse = *cell.size() > 0 ? 1 / *cell.size() : 0;
        for (int64_t k = 0; k < n; k++) {
            const float x = sizes[k] * inverse + 0.5f;
            whole[k] = (uint8_t) (x > 255 ? 255 : x > 0 ? (int) x : 0);
        }
    }
};

// order and starts of the cells that are not empty, those of more than CELL_KEYS_MOST in equal parts; how many.
int32_t order_keys(int64_t n, int32_t C, kmeans & by, uint32_t * starts) {
    int32_t n_cells = 0, at = 0;
    for (int32_t i = 0; i < C; i++) {
        const int32_t count = by.counts[i], parts = (int32_t) ((count + CELL_KEYS_MOST - 1) / CELL_KEYS_MOST);
        for (int32_t p = 0; p < parts; p++) {
            starts[n_cells++] = (uint32_t) (at + (int64_t) count * p / parts);
        }
        by.counts[i] = at; // from now on, where the next of its keys goes
        at += count;
    }
    starts[n_cells] = (uint32_t) n;
    for (int64_t j = 0; j < n; j++) {
        by.order[by.counts[by.which[j]]++] = (int32_t) j;
    }
    return n_cells;
}

// Of a chunk in order.
int64_t sixteens_of_chunk(int64_t c) { return c / RUN_KEYS * (RUN_KEYS / 16) + sixteens(c % RUN_KEYS); }

int32_t n_centres(int64_t n_keys) { return (int32_t) (n_keys / CELL_KEYS > 0 ? n_keys / CELL_KEYS : 1); }

// What making a stretch takes beside it.
struct room {
    kmeans by;
    float * turned;
    uint32_t * starts; // of cells, in order

    uint64_t lay_out(uint8_t * base, int32_t d, int64_t n) {
        const uint64_t first = by.lay_out(base, d, n, n_centres(n));
        turned = (float *) (base + first);
        const uint64_t second = first + CELL_KEYS_MOST * d * sizeof(float);
        starts = (uint32_t *) (base + second);
        return second + (n + 1) * sizeof(uint32_t);
    }
};

} // namespace
} // namespace actqkv

extern "C" int64_t actqkv_stretch_bytes(int32_t d_head, int64_t n_keys, int32_t in_order) {
    using namespace actqkv;
    const bool has_one = d_head % HALF_BLOCK == 0 && d_head <= MAX_CHANNELS && n_keys <= MAX_KEYS;
    const int64_t n_sixteens = sixteens_most(n_keys, in_order);
    return has_one ? keys_at(d_head, n_keys, in_order) + n_sixteens * 16 * key_bytes(d_head) + SLACK : 0;
}

extern "C" int64_t actqkv_stretch_cells(int64_t n_keys, int32_t in_order) {
    return actqkv::n_cells_most(n_keys, in_order);
}

extern "C" uint64_t actqkv_stretch_scratch(int32_t d_head, int64_t n_keys) {
    actqkv::room none;
    return none.lay_out(nullptr, d_head, n_keys);
}

extern "C" int32_t actqkv_stretch_is_sound(const uint8_t * stretch, int32_t d_head, int64_t n_keys, int32_t c) {
    using namespace actqkv;
    const stretch_view view = {const_cast<uint8_t *>(stretch), d_head, n_keys, 0};
    uint32_t head[2];
    memcpy(head, stretch, sizeof(head));
    if (head[0] < 1 || head[0] > n_cells_most(n_keys, 0) || head[1] != n_keys) {
        return 0;
    }
    bool sound = true;
    int64_t n_found = 0, sixteen = 0;
    for (uint32_t i = 0; sound && i < head[0]; i++) {
        uint32_t place;
        memcpy(&place, view.cell(i).place(), sizeof(place));
        const int64_t n = place % 256 + 1, m = 16 * sixteens(n);
        sound = place / 256 == sixteen && n_found + n <= n_keys;
        for (int64_t k = 0; sound && k < n; k++) {
            uint16_t chunk;
            memcpy(&chunk, view.keys(sixteen) + m + 2 * k, sizeof(chunk));
            sound = chunk < n_keys / c;
        }
        n_found += n;
        sixteen += m / 16;
    }
    return sound && n_found == n_keys;
}

extern "C" void actqkv_make_stretch(int32_t impl, int32_t type, const uint8_t * keys, int64_t chunk_stride, int32_t c,
                                    int32_t n_chunks, const float * common, int32_t d_head, uint8_t * stretch,
                                    void * scratch) {
    using namespace actqkv;
    const int64_t n = (int64_t) n_chunks * c;
    const kept_keys from = {type, keys, chunk_stride, c, actqkv_row_bytes(type, d_head)};
    room in;
    in.lay_out((uint8_t *) scratch, d_head, n);
    memset(stretch, 0, actqkv_stretch_bytes(d_head, n, 0));
    in.by.divide(impl, from, d_head, n, n_centres(n));
    const int32_t n_cells = order_keys(n, n_centres(n), in.by, in.starts);
    const uint32_t head[2] = {(uint32_t) n_cells, (uint32_t) n};
    memcpy(stretch, head, sizeof(head));
    float turned[MAX_CHANNELS];
    memcpy(turned, common, d_head * sizeof(float));
    actqkv_turn(turned, 1, d_head);
    const writer write = {ops_for(impl), from, turned, d_head, in.by.order, 0, in.turned, {stretch, d_head, n, 0}};
    int64_t sixteen = 0;
    for (int32_t i = 0; i < n_cells; i++) {
        sixteen += write.cell(i, in.starts[i], in.starts[i + 1], sixteen);
    }
}

extern "C" void actqkv_add_chunk(int32_t impl, int32_t type, const uint8_t * keys, int32_t c, const float * common,
                                 int32_t d_head, int64_t n_keys, int64_t chunk, uint8_t * stretch, void * scratch) {
    using namespace actqkv;
    const int64_t n_runs = n_runs_of(c);
    const kept_keys from = {type, keys, 0, c, actqkv_row_bytes(type, d_head)};
    room in;
    in.lay_out((uint8_t *) scratch, d_head, c);
    for (int32_t j = 0; j < c; j++) {
        in.by.order[j] = j;
    }
    if (chunk == 0) {
        memset(stretch, 0, actqkv_stretch_bytes(d_head, n_keys, c));
    }
    const uint32_t head[2] = {(uint32_t) ((chunk + 1) * n_runs), (uint32_t) ((chunk + 1) * c)};
    memcpy(stretch, head, sizeof(head));
    float turned[MAX_CHANNELS];
    memcpy(turned, common, d_head * sizeof(float));
    actqkv_turn(turned, 1, d_head);
    const writer write = {ops_for(impl), from,  turned,    d_head,
                          in.by.order,   chunk, in.turned, {stretch, d_head, n_keys, c}};
    int64_t sixteen = 0;
    for (int64_t i = 0; i < n_runs; i++) {
        const int64_t end = (i + 1) * RUN_KEYS < c ? (i + 1) * RUN_KEYS : c;
        sixteen += write.cell(chunk * n_runs + i, i * RUN_KEYS, end, chunk * sixteens_of_chunk(c) + sixteen);
    }
}
