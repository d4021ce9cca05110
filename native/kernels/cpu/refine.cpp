// refine - the score of a chunk by its keys themselves, for the few chunks that a cheaper score proposed.
//
//     score_hb = scale * max over keys j of the chunk of q_h . k_j
//
// Quest's bound (docs/algorithms.md section 4) is an upper bound of exactly this. Reads the candidates' keys once: n*c*G
// rows. Where those are quantised, the fast versions multiply integers, a row per lane, by queries rounded to 16 bits
// (ops_integer.h): with every lane a dot product of its own, half of the time went into adding up lanes.
#include <math.h>

#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace actqkv {
namespace {

constexpr int N_HEADS = N_GREATEST;    // query heads at a time, of one KV head
constexpr int PACKED_BYTES = 20 << 10; // packed queries: those of a few heads at a time where all of them do not fit

void greatest_scalar(const float * queries, int n_vec, int32_t type, const uint8_t * keys, int64_t n, int64_t d,
                     float * best) {
    const int64_t row = actqkv_row_bytes(type, d);
    for (int x = 0; x < n_vec; x++) {
        best[x] = -INFINITY;
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t e = 0; e < d; e++) {
                sum += (double) queries[x * d + e] * row_value(type, keys + j * row, e);
            }
            best[x] = sum > best[x] ? (float) sum : best[x];
        }
    }
}

} // namespace
} // namespace actqkv

extern "C" void actqkv_refine(int32_t impl, const float * query, int32_t type, const uint8_t * keys,
                              const int32_t * chunks, int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head,
                              int32_t c, float scale, float * scores, int32_t n_threads) {
    using namespace actqkv;
    const ops * op = ops_for(impl);
    const row_ops * rows = op ? &op->of(type) : nullptr;
    const int64_t query_bytes = rows && rows->query_bytes ? rows->query_bytes(d_head) : PACKED_BYTES + 1;
    const int32_t fitting = (int32_t) (PACKED_BYTES / query_bytes); // 0: no packing, or one query is too long for it
    const int32_t r = n_head / n_head_kv, most = fitting > 0 && fitting < n_head ? fitting : n_head;
    const int64_t tile = c * actqkv_row_bytes(type, d_head), chunk_bytes = n_head_kv * tile;
    parallel(n_threads, [=](int ith, int nth) {
        const int32_t from = (int32_t) ((int64_t) n * ith / nth), to = (int32_t) ((int64_t) n * (ith + 1) / nth);
        alignas(64) uint8_t packed[PACKED_BYTES];
        for (int32_t first = 0; from < to && first < n_head; first += most) {
            const int32_t last = n_head - first < most ? n_head : first + most;
            for (int32_t h = first; fitting > 0 && h < last; h++) {
                rows->pack_query(query + (int64_t) h * d_head, d_head, packed + (h - first) * query_bytes);
            }
            for (int32_t i = from; i < to; i++) { // a chunk's tiles lie together: all heads at a time
                const uint8_t * chunk = keys + chunks[i] * chunk_bytes;
                const uint8_t * next = i + 1 < to ? keys + chunks[i + 1] * chunk_bytes : nullptr;
                for (int32_t h = first, n_vec; h < last; h += n_vec) {
                    const int32_t of_group = r - h % r, left = last - h < N_HEADS ? last - h : N_HEADS;
                    n_vec = of_group < left ? of_group : left;
                    const uint8_t * of_head = chunk + h / r * tile;
                    const uint8_t * ahead = next && (h == first || h % r == 0) ? next + h / r * tile : nullptr;
                    float best[N_HEADS];
                    if (fitting > 0) {
                        rows->greatest_packed(packed + (h - first) * query_bytes, n_vec, of_head, c, d_head, best,
                                              ahead);
                    } else if (rows) {
                        rows->greatest(query + (int64_t) h * d_head, n_vec, of_head, c, d_head, best, ahead);
                    } else {
                        greatest_scalar(query + (int64_t) h * d_head, n_vec, type, of_head, c, d_head, best);
                    }
                    for (int32_t x = 0; x < n_vec; x++) {
                        scores[(int64_t) (h + x) * n + i] = scale * best[x];
                    }
                }
            }
        }
    });
}
