#include "method.h"

#include "../error.h"

#include "ggml.h"

#include <cmath>
#include <cstring>

namespace actqkv {

// clang-format off
const std::vector<actqkv_method> & method_table() {
    // actqkv's own columns were chosen by measuring eval_128k with the bundled model (README.md): bounds find what
    // averaged keys lose, and shares that differ much, as at temperature 1, cost it answers.
    static const std::vector<actqkv_method> table = {
        { "actqkv", ACTQKV_POSITIONS_AUTO, ACTQKV_RETRIEVE_TOP, ACTQKV_RETRIEVE_TOP, ACTQKV_SUMMARY_BOUNDS, 4,
          ACTQKV_PROBE_BIAS, 0, ACTQKV_STATISTICS_POOLED, 1000, ACTQKV_SCORE_DOT, 16,
          ACTQKV_CUTOFF_LAYERWISE, 1000.0f, 0.0f },
        { "published", ACTQKV_POSITIONS_CLAMPED, ACTQKV_RETRIEVE_TOP, ACTQKV_RETRIEVE_TOP, ACTQKV_SUMMARY_HEAD, 4,
          ACTQKV_PROBE_BIAS, -1, ACTQKV_STATISTICS_PUBLISHED, 1000, ACTQKV_SCORE_COSINE, 1,
          ACTQKV_CUTOFF_PUBLISHED, 1.0f, 0.0f },
        { "dense", ACTQKV_POSITIONS_EXACT, ACTQKV_RETRIEVE_ALL, ACTQKV_RETRIEVE_ALL, ACTQKV_SUMMARY_MEAN, 1,
          ACTQKV_PROBE_MEAN, 0, ACTQKV_STATISTICS_POOLED, 1000, ACTQKV_SCORE_DOT, 1,
          ACTQKV_CUTOFF_NONE, 1.0f, 0.0f },
    };
    return table;
}
// clang-format on

const actqkv_method & find_method(const char * name) {
    std::string known;
    for (const actqkv_method & row : method_table()) {
        if (strcmp(row.name, name) == 0) {
            return row;
        }
        known += known.empty() ? "" : ", ";
        known += row.name;
    }
    throw error(ACTQKV_ERR_ARGUMENT, format("unknown method '%s'; known: %s", name, known.c_str()));
}

actqkv_params default_params() {
    actqkv_params p = {};
    p.method = method_table().front();
    p.n_threads = 1;
    p.n_window = 256;
    p.n_sink = 64;
    p.n_local = 512;
    p.n_chunk_tokens = 32;
    p.budget = 2048;
    p.kv_type = GGML_TYPE_F16;
    return p;
}

namespace {

void check_range(const char * name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
        throw error(ACTQKV_ERR_ARGUMENT, format("%s is %lld, expected %lld to %lld", name, (long long) value,
                                                (long long) low, (long long) high));
    }
}

void check_method(const actqkv_method & m, int32_t n_chunk_tokens) {
    check_range("positions", m.positions, ACTQKV_POSITIONS_AUTO, ACTQKV_POSITIONS_EXACT);
    check_range("prefill", m.prefill, ACTQKV_RETRIEVE_ALL, ACTQKV_RETRIEVE_NONE);
    check_range("decode", m.decode, ACTQKV_RETRIEVE_ALL, ACTQKV_RETRIEVE_NONE);
    check_range("summary", m.summary, ACTQKV_SUMMARY_HEAD, ACTQKV_SUMMARY_BOUNDS);
    check_range("n_representatives", m.n_representatives, 1, n_chunk_tokens);
    check_range("probe", m.probe, ACTQKV_PROBE_MEAN, ACTQKV_PROBE_BIAS);
    check_range("probe_warmup", m.probe_warmup, -1, INT32_MAX);
    check_range("statistics", m.statistics, ACTQKV_STATISTICS_POOLED, ACTQKV_STATISTICS_PUBLISHED);
    check_range("statistics_cap", m.statistics_cap, 1, INT32_MAX / 256);
    check_range("score", m.score, ACTQKV_SCORE_COSINE, ACTQKV_SCORE_DOT);
    check_range("refine", m.refine, 1, 1024);
    check_range("cutoff", m.cutoff, ACTQKV_CUTOFF_NONE, ACTQKV_CUTOFF_PUBLISHED);
    if (!(m.cutoff_temperature > 0.0f) || !std::isfinite(m.cutoff_temperature)) {
        throw error(ACTQKV_ERR_ARGUMENT, format("cutoff_temperature is %g, expected > 0", m.cutoff_temperature));
    }
    if (!(m.question_weight >= 0.0f) || !std::isfinite(m.question_weight)) {
        throw error(ACTQKV_ERR_ARGUMENT, format("question_weight is %g, expected >= 0", m.question_weight));
    }
    if (m.summary == ACTQKV_SUMMARY_BOUNDS && m.score != ACTQKV_SCORE_DOT) {
        throw error(ACTQKV_ERR_ARGUMENT, "summary 'bounds' goes with score 'dot': bounds have no direction");
    }
    if (m.summary == ACTQKV_SUMMARY_BOUNDS && m.question_weight > 0.0f) {
        throw error(ACTQKV_ERR_ARGUMENT, "question_weight adds a cosine and goes with summaries 'head', 'kv_head' and "
                                         "'mean', not with 'bounds'");
    }
}

} // namespace

actqkv_params resolve_params(const actqkv_params & params, const hparams & hp) {
    actqkv_params p = params;
    check_range("n_ctx", p.n_ctx, 1, INT32_MAX / 2);
    check_range("n_threads", p.n_threads, 1, 512);
    check_range("n_sink", p.n_sink, 0, 1 << 20);
    check_range("n_local", p.n_local, 1, 1 << 20);
    check_range("n_chunk_tokens", p.n_chunk_tokens, 1, 1024);
    check_range("n_window (at most n_local)", p.n_window, 1, p.n_local);
    check_method(p.method, p.n_chunk_tokens);
    check_range("budget (at least n_sink + n_local + n_chunk_tokens)", p.budget,
                (int64_t) p.n_sink + p.n_local + p.n_chunk_tokens, INT32_MAX / 2);
    if (p.kv_type != GGML_TYPE_F16) {
        const char * name = p.kv_type >= 0 && p.kv_type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) p.kv_type) : "?";
        throw error(ACTQKV_ERR_ARGUMENT, format("kv_type %s (%d) is not supported, expected f16", name, p.kv_type));
    }
    if (p.method.positions == ACTQKV_POSITIONS_AUTO) {
        p.method.positions = p.n_ctx <= hp.n_ctx_train ? ACTQKV_POSITIONS_EXACT : ACTQKV_POSITIONS_CLAMPED;
    }
    if (p.method.probe_warmup < 0) {
        p.method.probe_warmup = 1000 / hp.n_layer; // published: the first 1000 layer calls
    }
    return p;
}

} // namespace actqkv
