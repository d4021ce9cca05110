// One vector of floats, in the widest form the flags of this translation unit allow. Internal linkage throughout: the
// code is compiled once per instruction set and must never be merged across objects.
#pragma once

#include <stdint.h>

#include "half.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push // gcc 12 takes its own _mm512_undefined_ps for a mistake (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// v_within: bit i is set where low <= x <= high in lane i, which NaN is not.
// v_where_greater(x, y, a, b): a where x > y, else b, also where one is NaN.
// v_store_lanes: from + i for each bit i of `within`, one behind the other, then whatever, W at most; how many bits there are.
// v_transpose: W vectors, as the columns that they were rows of.
// v_half: a half as float; v_load_i8: W signed bytes; v_load_i4: the low or high halves of W bytes, less 8.

#if defined(__AVX512F__)

constexpr int W = 16;           // floats of a vector
constexpr int TILE_VECTORS = 4; // columns of a register tile, in vectors: 6*4 accumulators of 32 registers
constexpr int STREAM_VECS = 4;  // query heads that share one read of a row
typedef __m512 vf;

static inline vf v_zero() { return _mm512_setzero_ps(); }
static inline vf v_set1(float x) { return _mm512_set1_ps(x); }
static inline vf v_load(const float * p) { return _mm512_loadu_ps(p); }
static inline void v_store(float * p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf v_load_f16(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline void v_store_f16(uint16_t * p, vf x) {
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline float v_half(const uint8_t * p) { return _cvtsh_ss(bits_of_half(p)); }
static inline vf v_load_i8(const uint8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}
static inline vf v_load_i4(const uint8_t * p, bool high) {
    const __m128i x = _mm_loadu_si128((const __m128i *) p), q = high ? _mm_srli_epi16(x, 4) : x;
    const __m128i centred = _mm_sub_epi8(_mm_and_si128(q, _mm_set1_epi8(15)), _mm_set1_epi8(8));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(centred));
}
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline uint32_t v_within(vf x, vf low, vf high) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LE_OQ);
}
static inline vf v_where_greater(vf x, vf y, vf a, vf b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), b, a);
}
static inline int v_store_lanes(int32_t * p, uint32_t within, int32_t from) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Into a register first: compressing into memory takes a hundred cycles on Zen 4.
    const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(from), lanes);
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16) within, all));
    return __builtin_popcount(within);
}
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } // a*b + c
static inline vf v_round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n, n whole in [-127, 127]; n = -127 gives 0
static inline vf v_ldexp(vf x, vf n) {
    const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(x, _mm512_castsi512_ps(bits));
}
static inline float v_sum(vf x) { return _mm512_reduce_add_ps(x); }
static inline float v_greatest(vf x) { return _mm512_reduce_max_ps(x); }

// ---- W words of 32 bits; shifts are of 16-bit halves

typedef __m512i vi;

static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_load(const uint8_t * p) { return _mm512_loadu_si512(p); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
template <int N> static inline vi vi_shift_left(vi x) { return _mm512_slli_epi16(x, N); }
template <int N> static inline vi vi_shift_right(vi x) { return _mm512_srli_epi16(x, N); }
template <int N> static inline vi vi_shift_signed(vi x) { return _mm512_srai_epi16(x, N); }
static inline vf v_of_vi(vi x) { return _mm512_cvtepi32_ps(x); }
static inline vi vi_low32(vi a, vi b) { return _mm512_unpacklo_epi32(a, b); }
static inline vi vi_high32(vi a, vi b) { return _mm512_unpackhi_epi32(a, b); }
static inline vi vi_low64(vi a, vi b) { return _mm512_unpacklo_epi64(a, b); }
static inline vi vi_high64(vi a, vi b) { return _mm512_unpackhi_epi64(a, b); }
static inline __m128i load_16(const uint8_t * p) { return _mm_loadu_si128((const __m128i *) p); }
// 16 bytes of every fourth row
static inline vi vi_load_lanes(const uint8_t * const * row, int64_t at) {
    const __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(load_16(row[0] + at)), load_16(row[4] + at), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, load_16(row[8] + at), 2), load_16(row[12] + at), 3);
}
// acc + a.lo*b.lo + a.hi*b.hi of the signed halves of each word
static inline vi vi_dot(vi acc, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
// acc + the sum of the products of each word's four bytes, those of a to 15 and those of b signed
static inline vi vi_dot_bytes(vi acc, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#endif
}
// The halves at `at` of W rows, as floats
static inline vf v_load_halves(const uint8_t * const * row, int64_t at) {
    const auto half = [&](int i) { return (short) bits_of_half(row[i] + at); };
    const __m256i x = _mm256_setr_epi16(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7), half(8),
                                        half(9), half(10), half(11), half(12), half(13), half(14), half(15));
    return _mm512_cvtph_ps(x);
}

// In each quarter: sums of its four lanes of a, b, c, d.
static inline vf v_sum_quarters(vf a, vf b, vf c, vf d) {
    const __m512d p = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d q = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
}

// out[i]: sum, or greatest, of the lanes of a[i], for 4 vectors.
static inline __m256 v_low_half(vf x) { return _mm512_castps512_ps256(x); }
static inline __m256 v_high_half(vf x) { return _mm512_extractf32x8_ps(x, 1); }
static inline void v_sum_four(const vf * a, float * out) {
    const vf x = v_sum_quarters(a[0], a[1], a[2], a[3]);
    const __m256 y = _mm256_add_ps(v_low_half(x), v_high_half(x));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

// Sums of neighbouring quarters: two of a, then two of b.
static inline vf v_sum_pairs(vf a, vf b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Lane i of the result: sum of the lanes of a[i], for W vectors. No loop: it would keep `a` in memory.
static inline vf v_sum_each(const vf * a) {
    const vf x = v_sum_pairs(v_sum_quarters(a[0], a[1], a[2], a[3]), v_sum_quarters(a[4], a[5], a[6], a[7]));
    const vf y = v_sum_pairs(v_sum_quarters(a[8], a[9], a[10], a[11]), v_sum_quarters(a[12], a[13], a[14], a[15]));
    return v_sum_pairs(x, y);
}
static inline void v_transpose(vf * x) {
    vf t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    const auto low = [](vf a, vf b) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](vf a, vf b) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    for (int i = 0; i < 16; i += 4) { // lane l of u[i + j] has rows i .. i + 3 of column 4l + j
        u[i] = low(t[i], t[i + 2]);
        u[i + 1] = high(t[i], t[i + 2]);
        u[i + 2] = low(t[i + 1], t[i + 3]);
        u[i + 3] = high(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const vf even = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), odd = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
        const vf even2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
        const vf odd2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        x[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
        x[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        x[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        x[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#elif defined(__AVX2__)

constexpr int W = 8;
constexpr int TILE_VECTORS = 2; // 6*2 accumulators of 16 registers
constexpr int STREAM_VECS = 2;
typedef __m256 vf;

static inline vf v_zero() { return _mm256_setzero_ps(); }
static inline vf v_set1(float x) { return _mm256_set1_ps(x); }
static inline vf v_load(const float * p) { return _mm256_loadu_ps(p); }
static inline void v_store(float * p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf v_load_f16(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline void v_store_f16(uint16_t * p, vf x) {
    _mm_storeu_si128((__m128i *) p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline float v_half(const uint8_t * p) { return _cvtsh_ss(bits_of_half(p)); }
static inline vf v_load_i8(const uint8_t * p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}
static inline vf v_load_i4(const uint8_t * p, bool high) {
    const __m128i x = _mm_loadl_epi64((const __m128i *) p), q = high ? _mm_srli_epi16(x, 4) : x;
    const __m128i centred = _mm_sub_epi8(_mm_and_si128(q, _mm_set1_epi8(15)), _mm_set1_epi8(8));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(centred));
}
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline uint32_t v_within(vf x, vf low, vf high) {
    const __m256 in = _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ));
    return (uint32_t) _mm256_movemask_ps(in);
}
static inline vf v_where_greater(vf x, vf y, vf a, vf b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_GT_OQ));
}
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf v_round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf v_ldexp(vf x, vf n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
static inline float v_sum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
static inline float v_greatest(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

typedef __m256i vi; // as above

static inline vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi vi_load(const uint8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
template <int N> static inline vi vi_shift_left(vi x) { return _mm256_slli_epi16(x, N); }
template <int N> static inline vi vi_shift_right(vi x) { return _mm256_srli_epi16(x, N); }
template <int N> static inline vi vi_shift_signed(vi x) { return _mm256_srai_epi16(x, N); }
static inline vf v_of_vi(vi x) { return _mm256_cvtepi32_ps(x); }
static inline vi vi_low32(vi a, vi b) { return _mm256_unpacklo_epi32(a, b); }
static inline vi vi_high32(vi a, vi b) { return _mm256_unpackhi_epi32(a, b); }
static inline vi vi_low64(vi a, vi b) { return _mm256_unpacklo_epi64(a, b); }
static inline vi vi_high64(vi a, vi b) { return _mm256_unpackhi_epi64(a, b); }
static inline __m128i load_16(const uint8_t * p) { return _mm_loadu_si128((const __m128i *) p); }
static inline vi vi_load_lanes(const uint8_t * const * row, int64_t at) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(row[0] + at)), load_16(row[4] + at), 1);
}
static inline vi vi_dot(vi acc, vi a, vi b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
static inline vi vi_dot_bytes(vi acc, vi a, vi b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
static inline vf v_load_halves(const uint8_t * const * row, int64_t at) {
    const auto half = [&](int i) { return (short) bits_of_half(row[i] + at); };
    const __m128i x = _mm_setr_epi16(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7));
    return _mm256_cvtph_ps(x);
}

static inline void v_sum_four(const vf * a, float * out) {
    const vf x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline vf v_sum_each(const vf * a) {
    const vf x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const vf y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
static inline void v_transpose(vf * x) {
    vf t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
        x[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
        x[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
}

#elif defined(__aarch64__)

constexpr int W = 4;
constexpr int TILE_VECTORS = 4; // 6*4 accumulators of 32 registers
constexpr int STREAM_VECS = 1;
typedef float32x4_t vf;

static inline vf v_zero() { return vdupq_n_f32(0); }
static inline vf v_set1(float x) { return vdupq_n_f32(x); }
static inline vf v_load(const float * p) { return vld1q_f32(p); }
static inline void v_store(float * p, vf x) { vst1q_f32(p, x); }
static inline vf v_load_f16(const uint16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void v_store_f16(uint16_t * p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
static inline float v_half(const uint8_t * p) { return load_half(p); }
static inline int8x8_t v_load_bytes(const uint8_t * p) {
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    return vcreate_s8(four);
}
static inline vf v_of_i8(int8x8_t x) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x)))); }
static inline vf v_load_i8(const uint8_t * p) { return v_of_i8(v_load_bytes(p)); }
static inline vf v_load_i4(const uint8_t * p, bool high) {
    const uint8x8_t x = vreinterpret_u8_s8(v_load_bytes(p)), q = high ? vshr_n_u8(x, 4) : vand_u8(x, vdup_n_u8(15));
    return v_of_i8(vsub_s8(vreinterpret_s8_u8(q), vdup_n_s8(8)));
}
static inline vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf v_min(vf a, vf b) { return vminq_f32(a, b); }
static inline vf v_max(vf a, vf b) { return vmaxq_f32(a, b); }
static inline uint32_t v_within(vf x, vf low, vf high) {
    const uint32_t bits[] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vandq_u32(vcgeq_f32(x, low), vcleq_f32(x, high)), vld1q_u32(bits)));
}
static inline vf v_where_greater(vf x, vf y, vf a, vf b) { return vbslq_f32(vcgtq_f32(x, y), a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf v_round(vf x) { return vrndnq_f32(x); }
static inline vf v_ldexp(vf x, vf n) {
    const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(x, vreinterpretq_f32_s32(bits));
}
static inline float v_sum(vf x) { return vaddvq_f32(x); }
static inline float v_greatest(vf x) { return vmaxvq_f32(x); }
static inline vf v_sum_each(const vf * a) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }
static inline void v_sum_four(const vf * a, float * out) { v_store(out, v_sum_each(a)); }
static inline void v_transpose(vf * x) {
    const auto pair = [](vf a, vf b) { return vreinterpretq_f64_f32(vtrn1q_f32(a, b)); };
    const auto other = [](vf a, vf b) { return vreinterpretq_f64_f32(vtrn2q_f32(a, b)); };
    const float64x2_t a = pair(x[0], x[1]), b = other(x[0], x[1]), c = pair(x[2], x[3]), d = other(x[2], x[3]);
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

#endif

#if defined(__AVX2__)
// quads[j], lane i: bytes 4j to 4j + 3 of the 16 at `at` of row i
static inline void vi_load_quads(const uint8_t * const * row, int64_t at, vi * quads) {
    const vi a = vi_load_lanes(row, at), b = vi_load_lanes(row + 1, at);
    const vi c = vi_load_lanes(row + 2, at), d = vi_load_lanes(row + 3, at);
    const vi ab = vi_low32(a, b), cd = vi_low32(c, d), ab_high = vi_high32(a, b), cd_high = vi_high32(c, d);
    quads[0] = vi_low64(ab, cd);
    quads[1] = vi_high64(ab, cd);
    quads[2] = vi_low64(ab_high, cd_high);
    quads[3] = vi_high64(ab_high, cd_high);
}

// ---- sketches: bytes of SKETCH_ROWS rows of VB keys, looked up and added, and two vectors of 16-bit words that those sums
// become. The keys of vb_words and vb_sizes have one order, which is not theirs in memory: even ones first; vw_in_order has
// theirs. vb_start: every key's sum is that much, which may be negative. vb_sizes: bytes as 15 bits. vw_scaled:
// round(a b / 2^15). v_of_words: as floats, VB / 2 of them.

constexpr int VB = 32;

typedef __m256i vw;

static inline __m256i load_32(const uint8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
static inline void vw_in_order(vw even, vw odd, vw * out) {
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    out[0] = _mm256_permute2x128_si256(low, high, 0x20);
    out[1] = _mm256_permute2x128_si256(low, high, 0x31);
}
static inline vw vw_scaled(vw a, vw b) { return _mm256_mulhrs_epi16(a, b); }
static inline void vb_sizes(const uint8_t * p, vw * out) {
    const __m256i bytes = load_32(p);
    out[0] = _mm256_srli_epi16(_mm256_slli_epi16(bytes, 8), 1);
    out[1] = _mm256_slli_epi16(_mm256_srli_epi16(bytes, 8), 7);
}

#if defined(__AVX512F__)
static inline void v_of_words(vw x, vf * out) { out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(x)); }

constexpr int SKETCH_ROWS = 2;
typedef __m512i vb;
struct vsums { // in 16 bits, of all words as they are, and of their upper bytes; they may wrap around
    __m512i words, upper;
};

// Rows `stride` bytes apart; of the second, where it is not there, 0
static inline vb vb_load_rows(const uint8_t * p, int64_t stride) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_32(p)), load_32(p + stride), 1);
}
static inline vb vb_low(vb x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline vb vb_high(vb x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
static inline vb vb_lookup(const uint8_t * table, vb index) {
    return _mm512_shuffle_epi8(_mm512_load_si512(table), index);
}
static inline vb vb_add(vb a, vb b) { return _mm512_add_epi8(a, b); }
static inline vsums vb_start(int sum) { // in the lanes of the first row
    return {_mm512_zextsi256_si512(_mm256_set1_epi16((short) (sum + sum * 256))),
            _mm512_zextsi256_si512(_mm256_set1_epi16((short) sum))};
}
static inline vsums vb_sum(vsums sums, vb x) {
    return {_mm512_add_epi16(sums.words, x), _mm512_add_epi16(sums.upper, _mm512_srli_epi16(x, 8))};
}
static inline __m256i both_rows(__m512i x) {
    return _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}
static inline void vb_words(vsums sums, vw * out) {
    out[0] = both_rows(_mm512_sub_epi16(sums.words, _mm512_slli_epi16(sums.upper, 8)));
    out[1] = both_rows(sums.upper);
}
#else
static inline void v_of_words(vw x, vf * out) {
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)));
    out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1)));
}

constexpr int SKETCH_ROWS = 1;
typedef __m256i vb;
struct vsums { // as above
    __m256i words, upper;
};

static inline vb vb_load_rows(const uint8_t * p, int64_t) { return load_32(p); }
static inline vb vb_low(vb x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
static inline vb vb_high(vb x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
static inline vb vb_lookup(const uint8_t * table, vb index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) table)), index);
}
static inline vb vb_add(vb a, vb b) { return _mm256_add_epi8(a, b); }
static inline vsums vb_start(int sum) {
    return {_mm256_set1_epi16((short) (sum + sum * 256)), _mm256_set1_epi16((short) sum)};
}
static inline vsums vb_sum(vsums sums, vb x) {
    return {_mm256_add_epi16(sums.words, x), _mm256_add_epi16(sums.upper, _mm256_srli_epi16(x, 8))};
}
static inline void vb_words(vsums sums, vw * out) {
    out[0] = _mm256_sub_epi16(sums.words, _mm256_slli_epi16(sums.upper, 8));
    out[1] = sums.upper;
}
#endif

#elif defined(__aarch64__)

constexpr int VB = 16;
constexpr int SKETCH_ROWS = 1;
typedef uint8x16_t vb;
typedef int16x8_t vw;
struct vsums {
    uint16x8_t low, high;
};

static inline vb vb_load_rows(const uint8_t * p, int64_t) { return vld1q_u8(p); }
static inline vb vb_low(vb x) { return vandq_u8(x, vdupq_n_u8(15)); }
static inline vb vb_high(vb x) { return vshrq_n_u8(x, 4); }
static inline vb vb_lookup(const uint8_t * table, vb index) { return vqtbl1q_u8(vld1q_u8(table), index); }
static inline vb vb_add(vb a, vb b) { return vaddq_u8(a, b); }
static inline vsums vb_start(int sum) { return {vdupq_n_u16((uint16_t) sum), vdupq_n_u16((uint16_t) sum)}; }
static inline vsums vb_sum(vsums sums, vb x) {
    return {vaddw_u8(sums.low, vget_low_u8(x)), vaddw_u8(sums.high, vget_high_u8(x))};
}
static inline void vb_words(vsums sums, vw * out) {
    out[0] = vreinterpretq_s16_u16(sums.low);
    out[1] = vreinterpretq_s16_u16(sums.high);
}
static inline void vw_in_order(vw low, vw high, vw * out) {
    out[0] = low;
    out[1] = high;
}
static inline void v_of_words(vw x, vf * out) {
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
    out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)));
}
static inline vw vw_scaled(vw a, vw b) { return vqrdmulhq_s16(a, b); }
static inline void vb_sizes(const uint8_t * p, vw * out) {
    const uint8x16_t bytes = vld1q_u8(p);
    out[0] = vreinterpretq_s16_u16(vshll_n_u8(vget_low_u8(bytes), 7));
    out[1] = vreinterpretq_s16_u16(vshll_n_u8(vget_high_u8(bytes), 7));
}

#endif

// The last n < W elements of an array: the lanes beyond are `fill` on loading and left alone on storing.
static inline vf v_load_n(const float * p, int n, float fill) {
    float x[W];
    for (int i = 0; i < W; i++) {
        x[i] = i < n ? p[i] : fill;
    }
    return v_load(x);
}

static inline vf v_load_f16_n(const uint16_t * p, int n) {
    uint16_t x[W];
    for (int i = 0; i < W; i++) {
        x[i] = i < n ? p[i] : 0;
    }
    return v_load_f16(x);
}

#if !defined(__AVX512F__)
static inline int v_store_lanes(int32_t * p, uint32_t within, int32_t from) {
    int n = 0;
    for (; within != 0; within &= within - 1) {
        p[n++] = from + __builtin_ctz(within);
    }
    return n;
}
#endif

static inline void v_store_n(float * p, vf x, int n) {
    float y[W];
    v_store(y, x);
    for (int i = 0; i < n; i++) {
        p[i] = y[i];
    }
}

// 2^x for x <= 0 to 2 units in the last place, exactly 0 from -127 on (so also for -infinity).
// Minimax polynomial of Cephes' exp2f on [-1/2, 1/2].
static inline vf v_exp2(vf x) {
    x = v_max(x, v_set1(-127));
    const vf n = v_round(x);
    const vf f = v_sub(x, n);
    vf p = v_set1(1.535336188319500e-4f);
    p = v_fma(p, f, v_set1(1.339887440266574e-3f));
    p = v_fma(p, f, v_set1(9.618437357674640e-3f));
    p = v_fma(p, f, v_set1(5.550332471162809e-2f));
    p = v_fma(p, f, v_set1(2.402264791363012e-1f));
    p = v_fma(p, f, v_set1(6.931472028550421e-1f));
    p = v_fma(p, f, v_set1(1));
    return v_ldexp(p, n);
}
