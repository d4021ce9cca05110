// Whether the CPU's extra buffer types (repacked weights, AMX) compute what plain buffers do.
#pragma once

namespace actqkv {

// Throws ACTQKV_ERR_COMPUTE when a product in an extra buffer type differs from the plain one. On a broken build
// (gcc 12 drops stores to AMX's tile configuration) the process dies here instead: run it in a child.
void try_extra_buffers();

} // namespace actqkv
