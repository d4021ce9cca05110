#include "method.h"

#include "../kernels/kernels.h"
#include "../kv/store.h"

#include "../error.h"

#include "ggml.h"

#include <cmath>
#include <cstring>

namespace actqkv {
namespace {

// Columns in the order of actqkv_method; another row says in which it differs from the one it starts from. These were
// chosen by measuring with the bundled model: models/results/README.md, native/README.md.
constexpr actqkv_method ACTQKV = {
    "actqkv",
    ACTQKV_POSITIONS_AUTO,
    ACTQKV_RETRIEVE_TOP,   // prefill
    ACTQKV_RETRIEVE_TOP,   // decode
    ACTQKV_SUMMARY_SPREAD, // finds as much as bounds do, in a seventh of their bytes
    4,                     // n_representatives
    ACTQKV_PROBE_BIAS,
    0, // probe_warmup
    ACTQKV_STATISTICS_POOLED,
    1000, // statistics_cap
    ACTQKV_SCORE_DOT,
    3072, // scan
    1,    // refine
    ACTQKV_CUTOFF_LAYERWISE,
    1000.0f, // cutoff_temperature: shares that differ much, as at 1, cost answers
    0.0f,    // question_weight
    ACTQKV_KEYS_UNROTATED,
    ACTQKV_GRANULARITY_LAYER,
    ACTQKV_VOTE_MAX,
    0,  // n_dense_layers
    32, // n_chunk_tokens
};

template <typename F> actqkv_method row(const char * name, actqkv_method from, F && change) {
    memset(from.name, 0, sizeof(from.name)); // all of it: states compare it
    snprintf(from.name, sizeof(from.name), "%s", name);
    change(from);
    return from;
}

// Without a probe, a cut-off or a refinement: the mean of a window's queries against bounds.
actqkv_method plain(actqkv_method m) {
    m.summary = ACTQKV_SUMMARY_BOUNDS;
    m.probe = ACTQKV_PROBE_MEAN;
    m.scan = 0;
    m.refine = 1;
    m.cutoff = ACTQKV_CUTOFF_NONE;
    m.cutoff_temperature = 1.0f;
    return m;
}

} // namespace

const std::vector<actqkv_method> & method_table() {
    static const std::vector<actqkv_method> table = [] {
        const actqkv_method base = plain(ACTQKV);
        const actqkv_method quest = row("quest", base, [](actqkv_method & m) { // docs/algorithms.md section 4
            m.positions = ACTQKV_POSITIONS_EXACT;
            m.prefill = ACTQKV_RETRIEVE_ALL;
            m.summary_keys = ACTQKV_KEYS_ATTENDED;
            m.granularity = ACTQKV_GRANULARITY_KV_HEAD;
            m.n_dense_layers = 2;
            m.n_chunk_tokens = 16;
        });
        return std::vector<actqkv_method>{
            ACTQKV,
            row("actqkv-uniform", ACTQKV, [](actqkv_method & m) { m.probe = ACTQKV_PROBE_MEAN; }),
            row("actqkv-equal", ACTQKV, [](actqkv_method & m) { m.cutoff = ACTQKV_CUTOFF_NONE; }),
            row("published", ACTQKV,
                [](actqkv_method & m) {
                    m.positions = ACTQKV_POSITIONS_CLAMPED;
                    m.summary = ACTQKV_SUMMARY_HEAD;
                    m.probe_warmup = -1;
                    m.statistics = ACTQKV_STATISTICS_PUBLISHED;
                    m.score = ACTQKV_SCORE_COSINE;
                    m.scan = 0;
                    m.refine = 1;
                    m.cutoff = ACTQKV_CUTOFF_PUBLISHED;
                    m.cutoff_temperature = 1.0f;
                }),
            quest,
            row("quest-clamped", quest,
                [](actqkv_method & m) { // of ours, for lengths beyond the trained one: dense reading would not end
                    m.positions = ACTQKV_POSITIONS_CLAMPED;
                    m.prefill = ACTQKV_RETRIEVE_TOP;
                }),
            row("infllm", base,
                [](actqkv_method & m) { // section 5, with the sizes of the session
                    m.positions = ACTQKV_POSITIONS_CLAMPED;
                    m.summary = ACTQKV_SUMMARY_HEAD;
                }),
            row("streaming", base,
                [](actqkv_method & m) { // section 6
                    m.positions = ACTQKV_POSITIONS_CLAMPED;
                    m.prefill = m.decode = ACTQKV_RETRIEVE_NONE;
                }),
            row("dense", base,
                [](actqkv_method & m) {
                    m.positions = ACTQKV_POSITIONS_EXACT;
                    m.prefill = m.decode = ACTQKV_RETRIEVE_ALL;
                }),
            row("oracle", base, [](actqkv_method & m) { m.prefill = m.decode = ACTQKV_RETRIEVE_ORACLE; }),
        };
    }();
    return table;
}

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

void require(bool holds, const char * message) {
    if (!holds) {
        throw error(ACTQKV_ERR_ARGUMENT, message);
    }
}

void check_columns(const actqkv_method & m, int32_t n_layer) {
    check_range("positions", m.positions, ACTQKV_POSITIONS_AUTO, ACTQKV_POSITIONS_EXACT);
    check_range("prefill", m.prefill, ACTQKV_RETRIEVE_ALL, ACTQKV_RETRIEVE_ORACLE);
    check_range("decode", m.decode, ACTQKV_RETRIEVE_ALL, ACTQKV_RETRIEVE_ORACLE);
    check_range("summary", m.summary, ACTQKV_SUMMARY_HEAD, ACTQKV_SUMMARY_SPREAD);
    check_range("n_chunk_tokens", m.n_chunk_tokens, 1, 1024);
    check_range("n_representatives", m.n_representatives, 1, m.n_chunk_tokens);
    check_range("probe", m.probe, ACTQKV_PROBE_MEAN, ACTQKV_PROBE_BIAS);
    check_range("probe_warmup", m.probe_warmup, -1, INT32_MAX);
    check_range("statistics", m.statistics, ACTQKV_STATISTICS_POOLED, ACTQKV_STATISTICS_PUBLISHED);
    check_range("statistics_cap", m.statistics_cap, 1, INT32_MAX / 256);
    check_range("score", m.score, ACTQKV_SCORE_COSINE, ACTQKV_SCORE_DOT);
    check_range("scan", m.scan, 0, 1 << 24);
    check_range("refine", m.refine, 1, 1024);
    check_range("cutoff", m.cutoff, ACTQKV_CUTOFF_NONE, ACTQKV_CUTOFF_PUBLISHED);
    check_range("summary_keys", m.summary_keys, ACTQKV_KEYS_UNROTATED, ACTQKV_KEYS_ATTENDED);
    check_range("granularity", m.granularity, ACTQKV_GRANULARITY_LAYER, ACTQKV_GRANULARITY_KV_HEAD);
    check_range("vote", m.vote, ACTQKV_VOTE_MAX, ACTQKV_VOTE_SUM);
    check_range("n_dense_layers (at most the model's layers)", m.n_dense_layers, 0, n_layer);
    if (!(m.cutoff_temperature > 0.0f) || !std::isfinite(m.cutoff_temperature)) {
        throw error(ACTQKV_ERR_ARGUMENT, format("cutoff_temperature is %g, expected > 0", m.cutoff_temperature));
    }
    if (!(m.question_weight >= 0.0f) || !std::isfinite(m.question_weight)) {
        throw error(ACTQKV_ERR_ARGUMENT, format("question_weight is %g, expected >= 0", m.question_weight));
    }
}

void check_relations(const actqkv_method & m) {
    const bool spread = m.summary == ACTQKV_SUMMARY_SPREAD, box = spread || m.summary == ACTQKV_SUMMARY_BOUNDS;
    const bool question = m.question_weight > 0.0f;
    require(!box || m.score == ACTQKV_SCORE_DOT,
            "summaries 'bounds' and 'spread' go with score 'dot': they have no direction");
    require(!box || !question, "question_weight adds a cosine and goes with summaries 'head', 'kv_head' and 'mean', "
                               "not with 'bounds' and 'spread'");
    require(!spread || m.granularity == ACTQKV_GRANULARITY_LAYER,
            "summary 'spread' goes with granularity 'layer', 'bounds' with both: a spread is of all KV heads together");
    require(m.summary_keys == ACTQKV_KEYS_UNROTATED || !question,
            "question_weight goes with summary_keys 'unrotated': a question has no position");
    if (m.granularity == ACTQKV_GRANULARITY_KV_HEAD) {
        require(m.score == ACTQKV_SCORE_DOT,
                "granularity 'kv_head' goes with score 'dot': each query head votes by it");
        require(m.scan == 0 && m.refine == 1,
                "granularity 'kv_head' goes with scan 0 and refine 1: both choose for all heads together");
        require(m.cutoff == ACTQKV_CUTOFF_NONE,
                "granularity 'kv_head' goes with cutoff 'none': a layer's entropy is of "
                "one list");
        require(!question, "granularity 'kv_head' goes with question_weight 0");
    }
}

void check_kv_type(int32_t type, int32_t d_head) {
    if (type != ACTQKV_KV_F16 && type != ACTQKV_KV_Q8_0 && type != ACTQKV_KV_Q4_0) {
        const char * name = type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) type) : "?";
        throw error(ACTQKV_ERR_ARGUMENT,
                    format("kv_type %s (%d) is not supported, expected f16, q8_0 or q4_0", name, type));
    }
    if (actqkv_row_bytes(type, d_head) == 0) {
        throw error(ACTQKV_ERR_ARGUMENT,
                    format("kv_type %s takes heads of a multiple of 16, the model's are %d: use f16",
                           ggml_type_name((ggml_type) type), d_head));
    }
}

} // namespace

actqkv_params resolve_params(const actqkv_params & params, const hparams & hp) {
    actqkv_params p = params;
    check_range("n_ctx", p.n_ctx, 1, INT32_MAX / 2);
    check_range("n_threads", p.n_threads, 1, 512);
    check_range("n_sink", p.n_sink, 0, 1 << 20);
    check_range("n_local", p.n_local, 1, 1 << 20);
    check_columns(p.method, hp.n_layer);
    check_range("n_window (at most n_local)", p.n_window, 1, p.n_local);
    check_relations(p.method);
    check_range("budget (at least n_sink + n_local + n_chunk_tokens)", p.budget,
                (int64_t) p.n_sink + p.n_local + p.method.n_chunk_tokens, INT32_MAX / 2);
    check_kv_type(p.kv_type, hp.d_head);
    if (searches(p.method) && actqkv_stretch_bytes(hp.d_head, p.method.n_chunk_tokens, 0) == 0) {
        throw error(
            ACTQKV_ERR_ARGUMENT,
            format("scan takes heads of a multiple of 16, at most 1024, the model's are %d: use scan 0", hp.d_head));
    }
    if (p.method.summary == ACTQKV_SUMMARY_SPREAD && actqkv_spread_bytes(hp.n_head_kv, hp.d_head) == 0) {
        throw error(
            ACTQKV_ERR_ARGUMENT,
            format("summary 'spread' takes heads of at most 1024, the model's are %d: use 'bounds'", hp.d_head));
    }
    if (p.method.positions == ACTQKV_POSITIONS_AUTO) {
        p.method.positions = p.n_ctx <= hp.n_ctx_train ? ACTQKV_POSITIONS_EXACT : ACTQKV_POSITIONS_CLAMPED;
    }
    if (p.method.positions == ACTQKV_POSITIONS_EXACT && p.n_ctx > hp.n_ctx_train) {
        const bool quest = strcmp(p.method.name, "quest") == 0; // has a row of its own for this
        throw error(
            ACTQKV_ERR_ARGUMENT,
            format("method '%.31s' has exact positions, which end at the %d tokens the model was trained on; n_ctx is "
                   "%d: use %s, or a smaller n_ctx",
                   p.method.name, hp.n_ctx_train, p.n_ctx, quest ? "method 'quest-clamped'" : "positions 'clamped'"));
    }
    if (p.method.probe_warmup < 0) {
        p.method.probe_warmup = 1000 / hp.n_layer; // published: the first 1000 layer calls
    }
    return p;
}

namespace {

// Names of values, by the numbers of the enums.
const char * const POSITIONS[] = {"auto", "clamped", "exact"};
const char * const RETRIEVAL[] = {"all", "top", "none", "oracle"};
const char * const SUMMARY[] = {"head", "kv_head", "mean", "bounds", "spread"};
const char * const PROBE[] = {"mean", "bias"};
const char * const STATISTICS[] = {"pooled", "published"};
const char * const SCORE[] = {"cosine", "dot"};
const char * const KEYS[] = {"unrotated", "attended"};
const char * const GRANULARITY[] = {"layer", "kv_head"};
const char * const VOTE[] = {"max", "sum"};

struct differences {
    std::string found;

    void add(const std::string & what) { found += (found.empty() ? "" : ", ") + what; }
    void choice(const char * name, int32_t a, int32_t b, const char * const * names) {
        if (a != b) {
            add(format("%s is '%s', the reading's '%s'", name, names[b], names[a]));
        }
    }
    void number(const char * name, double a, double b) {
        if (a != b) {
            add(format("%s is %g, the reading's %g", name, b, a));
        }
    }
};

void compare_summaries(differences & d, const actqkv_method & a, const actqkv_method & b) {
    d.choice("summary", a.summary, b.summary, SUMMARY);
    d.choice("summary_keys", a.summary_keys, b.summary_keys, KEYS);
    d.choice("granularity", a.granularity, b.granularity, GRANULARITY);
    const bool of_some = a.summary == ACTQKV_SUMMARY_HEAD || a.summary == ACTQKV_SUMMARY_KV_HEAD;
    if (a.summary == b.summary && of_some) {
        d.number("n_representatives", a.n_representatives, b.n_representatives);
    }
}

// What a reading that retrieves by score depends on beside its summaries and its budget.
void compare_scored_reading(differences & d, const actqkv_method & a, const actqkv_method & b) {
    d.choice("probe", a.probe, b.probe, PROBE);
    if (a.probe == b.probe && a.probe == ACTQKV_PROBE_BIAS) {
        d.number("probe_warmup", a.probe_warmup, b.probe_warmup);
        d.choice("statistics", a.statistics, b.statistics, STATISTICS);
        d.number("statistics_cap", a.statistics_cap, b.statistics_cap);
    }
    d.choice("score", a.score, b.score, SCORE);
    if (a.granularity == ACTQKV_GRANULARITY_KV_HEAD) {
        d.choice("vote", a.vote, b.vote, VOTE);
    }
    d.number("question_weight", a.question_weight, b.question_weight);
    if (b.cutoff != ACTQKV_CUTOFF_NONE && a.cutoff == ACTQKV_CUTOFF_NONE) {
        d.add("it has a cut-off, for which the reading kept no entropies");
    } else if (b.cutoff != ACTQKV_CUTOFF_NONE) {
        d.number("cutoff_temperature", a.cutoff_temperature, b.cutoff_temperature);
    }
}

} // namespace

void check_same_stores(const actqkv_method & reading, const actqkv_method & answering) {
    differences d;
    const bool scored = reading.prefill == ACTQKV_RETRIEVE_TOP;
    d.number("n_chunk_tokens", reading.n_chunk_tokens, answering.n_chunk_tokens);
    d.choice("positions", reading.positions, answering.positions, POSITIONS);
    d.choice("prefill", reading.prefill, answering.prefill, RETRIEVAL);
    if (reading.prefill != ACTQKV_RETRIEVE_ALL) {
        d.number("n_dense_layers", reading.n_dense_layers, answering.n_dense_layers);
    }
    if (scored || answering.decode == ACTQKV_RETRIEVE_TOP) {
        if (!scored && reading.decode != ACTQKV_RETRIEVE_TOP) {
            d.add("the reading made no summaries");
        } else {
            compare_summaries(d, reading, answering);
        }
        if (searches(answering) && !searches(reading)) {
            d.add("the reading made no index");
        }
    }
    if (scored && answering.prefill == ACTQKV_RETRIEVE_TOP) {
        compare_scored_reading(d, reading, answering);
    }
    if (!d.found.empty()) {
        throw error(ACTQKV_ERR_ARGUMENT, format("method '%.31s' cannot answer from what '%.31s' read: %s",
                                                answering.name, reading.name, d.found.c_str()));
    }
}

} // namespace actqkv
