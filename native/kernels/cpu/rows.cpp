// rows - from f16 to how keys and values are kept (rows.h; q8_0 and q4_0 as ggml makes them).
//
//     q8_0  s = max |x| / 127                          q_i = round(x_i / s), halves away from zero
//     q4_0  s = x_m / -8, x_m the first of largest |x|   q_i = min(15, floor(x_i / s + 8.5))
//
// Keys are turned before (kernels.h). Mean over layers and 24 queries of the KL divergence of attention over 5,376 closed
// tokens of examples/harbour.txt, keys in float64 against the type, of the bundled model at f0de763, without RoPE:
//
//                                        q8_0     q8_0 turned   q4_0    q4_0 turned
//     keys as they are                   0.0013   0.0011        0.30    0.24
//     two channels eight times larger    0.0050   0.0013        1.41    0.34
//
// The output of attention moves by an NMSE of 0.0003 (q8_0) and 0.04 (q4_0) for keys, 7e-6 and 0.002 for values.
//
// s is rounded to f16 after the division. A block whose values are not finite has no meaning, but does no harm. Runs
// once per token: small beside what made it.
#include "rows.h"

#include <math.h>

namespace actqkv {
namespace {

// x in [low, high] as a whole number, `low` for NaN.
int whole(float x, int low, int high) { return !(x > (float) low) ? low : x > (float) high ? high : (int) x; }

// x in [-128, 128] as a whole number, halves away from zero, as roundf, which is no instruction; 0 for NaN.
int nearest(float x) {
    const int towards_zero = x == x ? (int) x : 0;
    const float rest = x - (float) towards_zero;
    return towards_zero + (rest >= 0.5f) - (rest <= -0.5f);
}

void store_q8_0(const float * x, uint8_t * block) {
    float most = 0;
    for (int i = 0; i < BLOCK; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    }
    const float scale = most / 127, inverse = scale > 0 ? 1 / scale : 0;
    store_half(scale, block);
    for (int i = 0; i < BLOCK; i++) {
        block[2 + i] = (uint8_t) nearest(x[i] * inverse);
    }
}

constexpr int64_t MOST_TURNED = 256; // values of a segment

int64_t segment_of(int64_t n) {
    int64_t p = n & -n;
    return p < MOST_TURNED ? p : MOST_TURNED;
}

void turn_segment(float * x, int64_t p) {
    for (int64_t half = 1; half < p; half *= 2) {
        for (int64_t i = 0; i < p; i += 2 * half) {
            for (int64_t j = i; j < i + half; j++) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
        }
    }
    const float factor = 1 / sqrtf((float) p);
    for (int64_t i = 0; i < p; i++) {
        x[i] *= factor;
    }
}

} // namespace

void store_q4_0(const float * x, uint8_t * block) {
    float extreme = 0;
    for (int i = 0; i < BLOCK; i++) {
        extreme = fabsf(x[i]) > fabsf(extreme) ? x[i] : extreme;
    }
    const float scale = extreme / -8, inverse = scale != 0 ? 1 / scale : 0;
    store_half(scale, block);
    for (int i = 0; i < HALF_BLOCK; i++) {
        const int low = whole(x[i] * inverse + 8.5f, 0, 15), high = whole(x[i + HALF_BLOCK] * inverse + 8.5f, 0, 15);
        block[2 + i] = (uint8_t) (low | high << 4);
    }
}

} // namespace actqkv

extern "C" void actqkv_turn(float * x, int64_t n_rows, int64_t n) {
    const int64_t p = actqkv::segment_of(n);
    for (int64_t i = 0; i < n_rows * n; i += p) {
        actqkv::turn_segment(x + i, p);
    }
}

extern "C" int64_t actqkv_row_bytes(int32_t type, int64_t n) {
    const int64_t n_blocks = (n + actqkv::BLOCK - 1) / actqkv::BLOCK;
    if (type == ACTQKV_KV_F16) {
        return n * (int64_t) sizeof(actqkv_f16);
    }
    if (n % actqkv::HALF_BLOCK != 0) {
        return 0;
    }
    return type == ACTQKV_KV_Q8_0   ? n_blocks * actqkv::Q8_BYTES
           : type == ACTQKV_KV_Q4_0 ? n_blocks * actqkv::Q4_BYTES
                                    : 0;
}

extern "C" void actqkv_store_rows(int32_t type, int32_t turned, const actqkv_f16 * src, int64_t n_rows,
                                  int64_t n_values, uint8_t * dst) {
    using namespace actqkv;
    if (type == ACTQKV_KV_F16) {
        memcpy(dst, src, n_rows * n_values * sizeof(actqkv_f16));
        return;
    }
    const bool q8_0 = type == ACTQKV_KV_Q8_0;
    const int64_t p = segment_of(n_values); // divides MOST_TURNED
    for (int64_t row = 0; row < n_rows; row++, src += n_values) {
        for (int64_t from = 0; from < n_values; from += MOST_TURNED) {
            const int64_t n = n_values - from < MOST_TURNED ? n_values - from : MOST_TURNED;
            float x[MOST_TURNED] = {0};
            for (int64_t i = 0; i < n; i++) {
                x[i] = half_to_float(src[from + i]);
            }
            for (int64_t i = 0; turned && i < n; i += p) {
                turn_segment(x + i, p);
            }
            for (int64_t i = 0; i < n; i += BLOCK) {
                (q8_0 ? store_q8_0 : store_q4_0)(x + i, dst);
                dst += q8_0 ? Q8_BYTES : Q4_BYTES;
            }
        }
    }
}
