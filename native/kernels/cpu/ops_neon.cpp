// The inner loops for NEON, which every 64-bit ARM processor has: no flags.
#if defined(__aarch64__)
#include "ops_table.h"

namespace actqkv {
extern const ops ops_neon;
const ops ops_neon = ACTQKV_OPS;
} // namespace actqkv
#endif
