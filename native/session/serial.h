// What states and KV files share: which model they are of, and the parts of a checkpoint as bytes.
#pragma once

#include "../kv/bytes.h"
#include "../model/weights.h"
#include "checkpoint.h"
#include "history.h"

namespace actqkv {

// Shape, vocabulary size and norms. Norms tell apart models of one shape; they are small, the same in every quantisation
// of a model, and never repacked for a processor as matrices are.
uint64_t model_fingerprint(const hparams & hp, const weights & w);

void write_memory(writer & out, const std::vector<layer_memory> & memory);
void write_recent(writer & out, const recent_state & recent);
// That of the store, of which nothing is copied where out only counts.
void write_recent(writer & out, const kv_store & store, int64_t n_tokens);

// Throw ACTQKV_ERR_STATE where sizes are not those of this model, or of so many tokens and closed chunks in this store.
std::vector<layer_memory> read_memory(reader & in, const hparams & hp);
recent_state read_recent(reader & in, const kv_store & store, int64_t n_tokens, int64_t n_closed);

// Whether tokens and phases are such as a session over this model reads; `what` they are of, for the message.
void check_history(const history & read, const hparams & hp, const char * what);

} // namespace actqkv
