// search - which chunks hold the keys that a query attends to, found by cells of alike keys (cells.cpp).
//
//     score_hi = scale * (q_h . mu_i + 3 reach_i |q_h|)         of every cell: the best are looked into
//     a_hj     = scale * (q_h . mu + m_j sum_e +-q_he)          of their keys j, as their sketch has them
//     vote_b   = sum over heads h and keys j of chunk b of p_hj     p_h = softmax(a_h) where no less than its mean, else 0
//
// so that a chunk's vote is the attention that it would have among the keys looked at, but for keys that hardly count. Queries
// meet centres in whole 127ths of their largest channel. The sum over e is d/4 lookups: signs lie by fours of channels, table
// p of a query holds +-q_4p .. +-q_(4p+3) for each of the 16 patterns, as whole multiples of 1/63 of the largest, plus 63.
// Sums times sizes are rounded to 1/256 of the largest size, which is less than tables lose, so that 16 bits hold them. The
// idea of fours and tables in registers: Andre et al. 2015 (VLDB), for product quantisation.
#include <math.h>

#include "cells.h"
#include "parallel.h"

namespace actqkv {
namespace {

constexpr int PATTERNS = 16;            // of four signs
constexpr int GREATEST = SKETCH_OFFSET; // of a table: two entries, each plus the offset, add up within a byte
constexpr float ROUNDER = 3 << 22;      // float + this - this: to whole, ties to even; loops of it become vectors
constexpr float LOG2_E = 1.44269504f;
constexpr float LEAST = 1; // of the mean weight, that counts
constexpr float REACH = 3; // deviations from a centre that the keys of a cell are taken to reach

// Tables of a turned query as scan_job has them, and what an entry of 1 stands for.
float make_tables(const float * q, int32_t d, int rows, uint8_t * tables) {
    float most = 0, all = 0;
    for (int32_t p = 0; p < d; p += 4) {
        const float sum = fabsf(q[p]) + fabsf(q[p + 1]) + fabsf(q[p + 2]) + fabsf(q[p + 3]);
        most = sum > most ? sum : most;
        all += sum;
    }
    const bool has_some = most > 0 && isfinite(all) && isfinite(GREATEST / most);
    const float inverse = has_some ? GREATEST / most : 0;
    memset(tables, 0, sketch_table_bytes(d, rows));
    for (int32_t p = 0; p < d / 4; p++) {
        const float * four = q + 4 * p;
        float sums[PATTERNS] = {-four[0] - four[1] - four[2] - four[3]};
        for (int e = 0; e < 4; e++) {
            for (int i = 0; i < 1 << e; i++) {
                sums[i + (1 << e)] = sums[i] + 2 * four[e];
            }
        }
        uint8_t entries[PATTERNS];
        for (int i = 0; i < PATTERNS; i++) {
            const float whole = has_some ? sums[i] * inverse + ROUNDER - ROUNDER : 0;
            entries[i] = (uint8_t) ((int) whole + SKETCH_OFFSET);
        }
        const int row = p / 2, half = p % 2;
        uint8_t * table = tables + ((row / rows * 2 + half) * rows + row % rows) * rows * PATTERNS;
        for (int copy = 0; copy < rows; copy++) {
            memcpy(table + copy * PATTERNS, entries, PATTERNS);
        }
    }
    return has_some ? 1 / inverse : 0;
}

// The formula, with tables of one row.
int64_t scan_scalar(const scan_job * job) {
    int64_t n = 0;
    for (int32_t i = 0; i < job->n_cells; i++) {
        const scan_cell & cell = job->cells[i];
        const int64_t m = 16 * sixteens(cell.n);
        const uint8_t *sizes = cell.keys, *chunks = sizes + m, *signs = chunks + 2 * m;
        for (int32_t k = 0; k < cell.n; k++, n++) {
            int sum = -SKETCH_OFFSET * (job->d / 4);
            for (int32_t row = 0; row < job->d / 8; row++) {
                const int byte = signs[row * m + k];
                sum +=
                    job->tables[2 * row * PATTERNS + (byte & 15)] + job->tables[(2 * row + 1) * PATTERNS + (byte >> 4)];
            }
            const int product = (sum * sizes[k] + 128) >> 8;
            job->logits[n] = cell.base + cell.size * job->step * (float) product;
            uint16_t chunk;
            memcpy(&chunk, chunks + 2 * k, sizeof(chunk));
            job->chunks[n] = cell.first_chunk + chunk;
        }
    }
    return n;
}

// x[i] <- 2^(x[i] - the greatest); returns the sum.
float exponentiate(const ops * op, float * x, int64_t n) {
    float most = x[0];
    if (op) {
        most = op->max(x, n);
        return op->exp2_sum(x, n, most);
    }
    for (int64_t i = 1; i < n; i++) {
        most = x[i] > most ? x[i] : most;
    }
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        x[i] = exp2f(x[i] - most);
        sum += x[i];
    }
    return (float) sum;
}

int64_t find_scalar(const float * x, int64_t n, float low, int32_t * found) {
    int64_t n_found = 0;
    for (int64_t i = 0; i < n; i++) {
        found[n_found] = (int32_t) i;
        n_found += x[i] >= low;
    }
    return n_found;
}

float length_of(const float * q, int32_t d) {
    double squares = 0;
    for (int32_t e = 0; e < d; e++) {
        squares += q[e] * q[e];
    }
    return (float) sqrt(squares);
}

// The formula, of queries that are rounded already.
void centre_scores_scalar(const centre_job * job) {
    for (int32_t x = 0; x < job->n_vec; x++) {
        for (int64_t i = 0; i < job->n; i++) {
            uint8_t * block = const_cast<uint8_t *>(job->blocks) + i / CENTRES * job->block_bytes;
            const cell_view cell = {block, i % CENTRES, job->d};
            int32_t sum = -job->offsets[x];
            for (int32_t e = 0; e < job->d; e++) {
                const int8_t * q = (const int8_t *) (job->fours + (int64_t) x * job->d / 4);
                sum += q[e] * (is_high(e) ? *cell.centre(e) >> 4 : *cell.centre(e) & 15);
            }
            job->scores[x * job->lds + i] =
                job->query_steps[x] * *cell.step() * (float) sum + job->factors[x] * *cell.reach();
        }
    }
}

// A KV head's queries as centre_job has them; [n][d] floats are given.
struct rounded {
    int32_t fours[CENTRE_HEADS * MAX_CHANNELS / 4], offsets[CENTRE_HEADS];
    float steps[CENTRE_HEADS], factors[CENTRE_HEADS];

    void take(const float * queries, int32_t n, int32_t d) {
        for (int32_t x = 0; x < n; x++) {
            const float * q = queries + (int64_t) x * d;
            int8_t * whole = (int8_t *) (fours + (int64_t) x * d / 4);
            float most = 0;
            for (int32_t e = 0; e < d; e++) {
                most = fabsf(q[e]) > most ? fabsf(q[e]) : most;
            }
            const float inverse = most > 0 && isfinite(most) ? 127 / most : 0;
            offsets[x] = 0;
            for (int32_t e = 0; e < d; e++) { // becomes vectors
                whole[e] = (int8_t) (int) (inverse > 0 ? q[e] * inverse + ROUNDER - ROUNDER : 0);
                offsets[x] += 8 * whole[e];
            }
            steps[x] = inverse > 0 ? 1 / inverse : 0;
            factors[x] = REACH * length_of(q, d);
        }
    }
};

// Beside the keys of cells that are picked: one head's room.
struct room {
    uint8_t * tables;
    scan_cell * cells[2]; // of the head that is scanned, and of the next
    float * logits;
    int32_t *chunks, *found;
    int32_t * order; // [n_cells]
    float * votes;   // [n_chunks]
    uint64_t * n_bytes;
};

int64_t most_cells(const actqkv_search_args & args) {
    int64_t n = args.n_picked;
    for (int32_t s = 0; s < args.n_stretches; s++) {
        const int32_t in_order = args.stretches[s].in_order;
        n += in_order ? n_cells_most(args.stretches[s].n_keys, in_order) : 0;
    }
    return n;
}

int64_t most_keys(const actqkv_search_args & args) {
    int64_t n = args.n_picked * CELL_KEYS_MOST;
    for (int32_t s = 0; s < args.n_stretches; s++) {
        n += args.stretches[s].in_order ? args.stretches[s].n_keys : 0;
    }
    return n;
}

uint64_t lay_out(room & to, uint8_t * base, const actqkv_search_args & args) {
    uint64_t used = 0;
    const auto take = [&](uint64_t bytes) {
        uint8_t * p = base ? base + used : nullptr;
        used += (bytes + 63) / 64 * 64;
        return p;
    };
    const int64_t n_keys = most_keys(args) + SLACK;
    to.tables = take(sketch_table_bytes(args.d_head, MAX_SKETCH_ROWS));
    for (scan_cell *& cells : to.cells) {
        cells = (scan_cell *) take(most_cells(args) * sizeof(scan_cell));
    }
    to.logits = (float *) take(n_keys * sizeof(float));
    to.chunks = (int32_t *) take(n_keys * sizeof(int32_t));
    to.found = (int32_t *) take(n_keys * sizeof(int32_t));
    to.order = (int32_t *) take(args.n_cells * sizeof(int32_t));
    to.votes = (float *) take(args.n_chunks * sizeof(float));
    to.n_bytes = (uint64_t *) take(sizeof(uint64_t));
    return used;
}

// The turned queries, times scale, lie in front of all rooms.
uint64_t queries_bytes(const actqkv_search_args & args) {
    return ((uint64_t) args.n_head * args.d_head * sizeof(float) + 63) / 64 * 64;
}

// What head h looks at: the cells that it picked, then all that are not divided. picked ascends, and so do stretches.
int32_t list_cells(const actqkv_search_args & args, int32_t h, float length, scan_cell * cells) {
    const int32_t g = h / (args.n_head / args.n_head_kv);
    const int32_t * picked = args.picked + (int64_t) h * args.n_picked;
    const float * scores = args.scores + h * args.n_cells;
    int32_t n = 0, p = 0;
    int64_t first = 0; // cell of the stretch
    for (int32_t s = 0; s < args.n_stretches; s++) {
        const stretch_view view = view_of(args.stretches[s], g, args.d_head);
        const int64_t n_cells = view.n_cells();
        const auto add = [&](int64_t i) {
            const cell_view cell = view.cell(i);
            cells[n].keys = view.keys_of(cell);
            cells[n].n = (int32_t) cell.n_keys();
            cells[n].base = (scores[first + i] - REACH * length * *cell.reach()) * LOG2_E;
            cells[n].size = *cell.size();
            cells[n].first_chunk = (int32_t) args.stretches[s].first_chunk;
            n++;
        };
        if (!args.stretches[s].in_order) {
            int32_t end = p;
            for (; end < args.n_picked && picked[end] >= 0 && picked[end] < first + n_cells; end++) {
                const cell_view cell = view.cell(picked[end] - first);
                __builtin_prefetch(cell.reach());
                __builtin_prefetch(cell.size());
                __builtin_prefetch(cell.place());
            }
            for (; p < end; p++) {
                add(picked[p] - first);
            }
        } else {
            for (int64_t i = 0; i < n_cells; i++) {
                add(i);
            }
        }
        first += n_cells;
    }
    return n;
}

// The best of head h's cells, and all that are not divided; how many there are.
int32_t pick(int32_t impl, const actqkv_search_args & args, int32_t h, int32_t * order, scan_cell * cells) {
    int32_t * picked = args.picked + (int64_t) h * args.n_picked;
    int64_t n_divided;
    actqkv_search_cells(args.stretches, args.n_stretches, h / (args.n_head / args.n_head_kv), args.d_head, &n_divided);
    actqkv_top_k(impl, args.scores + h * args.n_cells, n_divided, args.n_picked, picked, order);
    for (int64_t i = n_divided; i < args.n_picked; i++) {
        picked[i] = -1;
    }
    const float * query = (const float *) args.scratch + (int64_t) h * args.d_head;
    return list_cells(args, h, length_of(query, args.d_head), cells);
}

// The votes of a head, whose cells the job has.
void vote(const ops * op, const actqkv_search_args & args, const float * query, const room & in, scan_job job) {
    job.step = 256 * LOG2_E * make_tables(query, args.d_head, op ? op->sketch_rows : 1, in.tables);
    for (int32_t i = 0; i < job.n_cells; i++) {
        *in.n_bytes += 16 * sixteens(job.cells[i].n) * key_bytes(args.d_head);
    }
    const int64_t n = (op ? op->scan : scan_scalar)(&job);
    const float sum = n > 0 ? exponentiate(op, in.logits, n) : 0;
    const float factor = sum > 0 ? 1 / sum : 0, least = LEAST * sum / (float) n;
    const int64_t n_found =
        op ? op->find(in.logits, n, least, INFINITY, in.found) : find_scalar(in.logits, n, least, in.found);
    for (int64_t i = 0; i < n_found; i++) {
        in.votes[in.chunks[in.found[i]]] += in.logits[in.found[i]] * factor;
    }
}

// Those of heads [begin, end): while one is scanned, the next one's keys are on their way.
void vote_heads(int32_t impl, const actqkv_search_args & args, int32_t begin, int32_t end, const room & in) {
    const ops * op = ops_for(impl);
    scan_job job = {};
    job.tables = in.tables;
    job.d = args.d_head;
    job.logits = in.logits;
    job.chunks = in.chunks;
    for (int32_t h = begin; h <= end; h++) {
        scan_cell * next = in.cells[h % 2];
        job.ahead = next;
        job.n_ahead = h < end ? pick(impl, args, h, in.order, next) : 0;
        if (h == begin && op) {
            op->scan(&job); // of no cells: only fetches
        } else if (h > begin) {
            vote(op, args, (const float *) args.scratch + (int64_t) (h - 1) * args.d_head, in, job);
        }
        job.cells = next;
        job.n_cells = job.n_ahead;
    }
}

} // namespace
} // namespace actqkv

extern "C" int64_t actqkv_search_cells(const struct actqkv_stretch * stretches, int32_t n_stretches, int32_t g,
                                       int32_t d_head, int64_t * n_divided) {
    using namespace actqkv;
    int64_t n = 0;
    *n_divided = 0;
    for (int32_t s = 0; s < n_stretches; s++) {
        n += view_of(stretches[s], g, d_head).n_cells();
        *n_divided = stretches[s].in_order ? *n_divided : n;
    }
    return n;
}

extern "C" uint64_t actqkv_search_scratch(const struct actqkv_search_args * args) {
    using namespace actqkv;
    room none;
    return queries_bytes(*args) + args->n_threads * lay_out(none, nullptr, *args);
}

extern "C" void actqkv_search_score(int32_t impl, const struct actqkv_search_args * given) {
    using namespace actqkv;
    const actqkv_search_args & args = *given;
    const ops * op = ops_for(impl);
    const int32_t r = args.n_head / args.n_head_kv, d = args.d_head;
    float * queries = (float *) args.scratch;
    for (int64_t e = 0; e < (int64_t) args.n_head * d; e++) {
        queries[e] = args.query[e] * args.scale;
    }
    actqkv_turn(queries, args.n_head, d);
    int64_t n_all = 0; // blocks of all KV heads, times the parts of their heads
    const int32_t n_parts = (r + CENTRE_HEADS - 1) / CENTRE_HEADS;
    for (int32_t s = 0; s < args.n_stretches; s++) {
        for (int32_t g = 0; g < args.n_head_kv; g++) {
            n_all += n_parts * sixteens(view_of(args.stretches[s], g, d).n_cells());
        }
    }
    parallel(args.n_threads, [&](int ith, int nth) {
        const int64_t begin = n_all * ith / nth, end = n_all * (ith + 1) / nth;
        rounded in;
        int64_t at = 0;
        for (int32_t h = 0, n_vec; h < args.n_head && at < end; h += n_vec) {
            const int32_t g = h / r, left = (g + 1) * r - h; // of the group
            n_vec = left < CENTRE_HEADS ? left : CENTRE_HEADS;
            bool taken = false;
            float * scores = args.scores + h * args.n_cells;
            for (int32_t s = 0; s < args.n_stretches; s++) {
                const stretch_view view = view_of(args.stretches[s], g, d);
                const int64_t n_blocks = sixteens(view.n_cells());
                const int64_t from = begin > at ? begin - at : 0, to = end - at < n_blocks ? end - at : n_blocks;
                if (from < to) {
                    if (!taken) {
                        in.take(queries + (int64_t) h * d, n_vec, d);
                        taken = true;
                    }
                    centre_job job = {};
                    job.d = d;
                    job.n_vec = n_vec;
                    job.fours = in.fours;
                    job.offsets = in.offsets;
                    job.query_steps = in.steps;
                    job.factors = in.factors;
                    job.block_bytes = block_bytes(d);
                    job.blocks = view.blocks() + from * job.block_bytes;
                    job.n = (to < n_blocks ? to * CENTRES : view.n_cells()) - from * CENTRES;
                    job.scores = scores + from * CENTRES;
                    job.lds = args.n_cells;
                    (op ? op->centre_scores : centre_scores_scalar)(&job);
                }
                scores += view.n_cells();
                at += n_blocks;
            }
        }
    });
}

extern "C" uint64_t actqkv_search_vote(int32_t impl, const struct actqkv_search_args * given) {
    using namespace actqkv;
    const actqkv_search_args & args = *given;
    room first;
    const uint64_t bytes = lay_out(first, nullptr, args);
    uint8_t * rooms = (uint8_t *) args.scratch + queries_bytes(args);
    parallel(args.n_threads, [&](int ith, int nth) { // there may be fewer than asked for
        for (int32_t part = ith; part < args.n_threads; part += nth) {
            room own;
            lay_out(own, rooms + part * bytes, args);
            own.votes = part == 0 ? args.votes : own.votes;
            memset(own.votes, 0, args.n_chunks * sizeof(float));
            *own.n_bytes = 0;
            vote_heads(impl, args, args.n_head * part / args.n_threads, args.n_head * (part + 1) / args.n_threads, own);
        }
    });
    lay_out(first, rooms, args);
    uint64_t n_read = *first.n_bytes;
    for (int32_t i = 1; i < args.n_threads; i++) {
        room other;
        lay_out(other, rooms + i * bytes, args);
        for (int64_t b = 0; b < args.n_chunks; b++) {
            args.votes[b] += other.votes[b];
        }
        n_read += *other.n_bytes;
    }
    return n_read;
}
