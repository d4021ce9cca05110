// IEEE half precision <-> float by integer arithmetic, for the scalar loops and for tails. No table, no ISA.
#pragma once

#include <stdint.h>
#include <string.h>

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31;
    uint32_t mantissa = h & 0x3ff;
    uint32_t bits;
    if (exponent == 31) { // infinity, NaN
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else { // zero or subnormal: mantissa * 2^-24 is exact in float
        const float value = (float) mantissa * 5.9604644775390625e-8f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest, ties to even; beyond the largest half becomes infinity, NaN stays NaN.
static inline uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        return (uint16_t) (sign | 0x7e00 | (bits >> 13 & 0x3ff));
    }
    if (bits >= 0x477ff000u) { // 65520 and above
        return (uint16_t) (sign | 0x7c00);
    }
    if (bits < 0x38800000u) { // below 2^-14 the half is subnormal: adding 0.5 aligns and rounds the mantissa
        float value;
        memcpy(&value, &bits, 4);
        value += 0.5f;
        memcpy(&bits, &value, 4);
        return (uint16_t) (sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1); // rounds to even, the carry may raise the exponent, as it should
    return (uint16_t) (sign | ((bits - 0x38000000u) >> 13));
}

// The half at any address, as bits and as float; and a float put there as one.
static inline uint16_t bits_of_half(const uint8_t * p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof(bits));
    return bits;
}

static inline float load_half(const uint8_t * p) { return half_to_float(bits_of_half(p)); }

static inline void store_half(float f, uint8_t * p) {
    const uint16_t bits = float_to_half(f);
    memcpy(p, &bits, sizeof(bits));
}
