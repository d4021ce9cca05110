// Which instruction set runs, decided at run time; nothing here or in static initialisers needs more than the base ISA.
#include "half.h"
#include "ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace actqkv {

#if defined(__x86_64__)
extern const ops ops_avx2;
extern const ops ops_avx512;
extern const ops ops_avx512_vnni;

static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Zen 5 and what follows.
static bool is_zen5() {
    constexpr unsigned AUTH = 0x68747541, ZEN5 = 0x1a; // of "AuthenticAMD"; a family
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != AUTH || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        return false;
    }
    return (eax >> 8 & 15) + (eax >> 20 & 255) >= ZEN5;
}

const bool fetches_to_first = is_zen5();
#else
const bool fetches_to_first = false;

#if defined(__aarch64__)
extern const ops ops_neon;
#endif
#endif

const ops * ops_for(int32_t impl) {
#if defined(__x86_64__)
    if (impl == ACTQKV_IMPL_AVX512_VNNI && has_avx512() && __builtin_cpu_supports("avx512vnni")) {
        return &ops_avx512_vnni;
    }
    if (impl == ACTQKV_IMPL_AVX512 && has_avx512()) {
        return &ops_avx512;
    }
    if (impl == ACTQKV_IMPL_AVX2 && has_avx2()) {
        return &ops_avx2;
    }
#elif defined(__aarch64__)
    if (impl == ACTQKV_IMPL_NEON) {
        return &ops_neon;
    }
#endif
    (void) impl;
    return nullptr;
}

} // namespace actqkv

extern "C" int32_t actqkv_impl_best(void) {
    const int32_t in_order[] = {ACTQKV_IMPL_AVX512_VNNI, ACTQKV_IMPL_AVX512, ACTQKV_IMPL_AVX2, ACTQKV_IMPL_NEON};
    for (int32_t impl : in_order) {
        if (actqkv::ops_for(impl)) {
            return impl;
        }
    }
    return ACTQKV_IMPL_SCALAR;
}

extern "C" void actqkv_to_f16(int32_t impl, const float * src, actqkv_f16 * dst, int64_t n) {
    if (const actqkv::ops * ops = actqkv::ops_for(impl)) {
        return ops->to_f16(src, dst, n);
    }
    for (int64_t i = 0; i < n; i++) {
        dst[i] = float_to_half(src[i]);
    }
}
