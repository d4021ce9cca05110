// The table of methods (docs/algorithms.md section 6): a method is a row, and nothing else distinguishes methods.
#pragma once

#include "actqkv.h"

#include "../model/hparams.h"

#include <vector>

namespace actqkv {

const std::vector<actqkv_method> & method_table();

// Throws ACTQKV_ERR_ARGUMENT listing the known names.
const actqkv_method & find_method(const char * name);

actqkv_params default_params();

// Checks every value and their relations; resolves AUTO positions and the published probe warm-up for this model.
// Throws ACTQKV_ERR_ARGUMENT saying what is allowed.
actqkv_params resolve_params(const actqkv_params & params, const hparams & hp);

// Whether `answering` can answer from the stores that `reading` made, as a session of its own would have them; both
// resolved. Throws ACTQKV_ERR_ARGUMENT naming every column that differs. The rule stands at actqkv_set_answering.
void check_same_stores(const actqkv_method & reading, const actqkv_method & answering);

// Chunks that a prefill window retrieves per layer, and a decode step on average.
inline int32_t n_retrieved(const actqkv_params & p) {
    return (p.budget - p.n_sink - p.n_local) / p.method.n_chunk_tokens;
}

// Whether some window attends all chunks, or must to know their mass.
inline bool attends_all(const actqkv_method & m) {
    const auto all = [](int32_t r) { return r == ACTQKV_RETRIEVE_ALL || r == ACTQKV_RETRIEVE_ORACLE; };
    return all(m.prefill) || all(m.decode) || m.n_dense_layers > 0;
}

} // namespace actqkv
