// The inner loops for AVX512. On x86-64 this file alone is compiled with its flags (CMakeLists.txt): nothing in it may be
// called before ops_for() has asked the processor, and nothing of it may be visible to the linker but the table.
#if defined(__x86_64__)
#include "ops_table.h"

namespace actqkv {
extern const ops ops_avx512;
const ops ops_avx512 = ACTQKV_OPS;
} // namespace actqkv
#endif
