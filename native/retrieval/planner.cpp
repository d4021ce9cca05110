#include "planner.h"

#include "method.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace actqkv {
namespace {

constexpr int64_t ALONE_BYTES = 64 << 10; // of summaries, that one thread scores: about 5 us

class stopwatch {
public:
    explicit stopwatch(planner_stage & stage) : stage(stage), start(std::chrono::steady_clock::now()) {}
    ~stopwatch() {
        stage.ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    }

private:
    planner_stage & stage;
    std::chrono::steady_clock::time_point start;
};

// A query in the form that meets a summary kind: per query head as it is; per KV head summed over the group; for
// bounds, sum over heads of max(q.lo, q.hi) = (sum of negative parts).lo + (sum of positive parts).hi.
void fold(const hparams & hp, int32_t kind, const float * query, std::vector<float> & folded) {
    const int r = hp.n_head / hp.n_head_kv, d = hp.d_head;
    if (kind == ACTQKV_SUMMARY_HEAD) {
        folded.assign(query, query + hp.n_channels());
        return;
    }
    const bool bounds = kind == ACTQKV_SUMMARY_BOUNDS;
    folded.assign(summary_width(kind, hp), 0.0f);
    float * upper = folded.data() + (bounds ? hp.n_kv_channels() : 0);
    for (int h = 0; h < hp.n_head; h++) {
        for (int e = 0; e < d; e++) {
            const float q = query[h * d + e];
            const int at = (h / r) * d + e;
            if (bounds && q < 0.0f) {
                folded[at] += q;
            } else {
                upper[at] += q;
            }
        }
    }
}

// The same for every query head apart, [H][width]: bounds take the negative parts, then the positive ones.
void split_heads(const hparams & hp, int32_t kind, const float * query, std::vector<float> & heads) {
    if (kind != ACTQKV_SUMMARY_BOUNDS) {
        heads.assign(query, query + hp.n_channels());
        return;
    }
    heads.resize(2 * hp.n_channels());
    for (int64_t i = 0; i < hp.n_channels(); i++) {
        float * low = heads.data() + 2 * (i - i % hp.d_head) + i % hp.d_head;
        low[0] = std::min(query[i], 0.0f);
        low[hp.d_head] = std::max(query[i], 0.0f);
    }
}

// Cells of an index that each query head looks into.
int32_t n_picked_of(const actqkv_method & method) { return method.scan > 0 ? std::max(1, method.scan / 64) : 0; }

} // namespace

choice choice_of(const actqkv_method & method, int64_t share, int64_t n_chunks) {
    const int64_t k = std::min(share, n_chunks);
    return {k, n_chunks, std::min(n_chunks, k * method.refine), n_picked_of(method)};
}

int64_t cutoff_share(int64_t pool, const double * h, int n_layers_left, int64_t k, int64_t n_chunks, bool published) {
    const int64_t rest = n_layers_left - 1;
    const double sum = std::accumulate(h, h + n_layers_left, 0.0);
    const double part = sum > 0.0 ? pool * h[0] / sum : (double) pool / n_layers_left;
    if (published) {
        return std::clamp<int64_t>(std::llround(part), std::min<int64_t>(32, 2 * k), 2 * k);
    }
    const int64_t low = std::min<int64_t>(n_chunks, (7 * k + 9) / 10); // ceil(0.7 k)
    const int64_t high = std::min<int64_t>(n_chunks, 2 * k);
    const int64_t at_least = std::max<int64_t>(low, pool - rest * high);
    const int64_t at_most = std::min<int64_t>(high, pool - rest * low);
    return std::clamp<int64_t>(std::llround(part), std::min(at_least, at_most), at_most);
}

planner::planner(const hparams & hp, const actqkv_params & reading, const actqkv_params & answering)
    : hp(hp), reading(reading), answering(answering), mean_entropy(hp.n_layer), bias(reading.n_window),
      weights(reading.n_window), probe(hp.n_channels()) {}

void planner::begin_window(const std::vector<layer_memory> & memory, int64_t n, bool decode) {
    n_chunks = n;
    is_decode = decode;
    const actqkv_method & method = now().method;
    const bool published = method.cutoff == ACTQKV_CUTOFF_PUBLISHED;
    const int64_t k = n_retrieved(now());
    pool = (hp.n_layer - method.n_dense_layers) * (published ? k : std::min(k, n_chunks));
    bool full = true; // published: entropies count once every layer has N_ENTROPIES of them
    for (int il = method.n_dense_layers; il < hp.n_layer; il++) {
        const std::vector<double> & h = memory[il].entropies;
        mean_entropy[il] = h.empty() ? 0.0 : std::accumulate(h.begin(), h.end(), 0.0) / h.size();
        full = full && h.size() >= N_ENTROPIES;
    }
    if (n_chunks <= 1) {
        std::fill(mean_entropy.begin(), mean_entropy.end(), 0.0); // equal shares
    }
    equal_shares = !is_decode || method.cutoff == ACTQKV_CUTOFF_NONE || (published && !full);
}

int32_t planner::retrieval_of(int il) const {
    const actqkv_method & method = now().method;
    return il < method.n_dense_layers ? ACTQKV_RETRIEVE_ALL : is_decode ? method.decode : method.prefill;
}

// q_met: the queries as they meet summaries. Bias is of far queries in any case.
void planner::make_probe(layer_memory & memory, const float * q_far, const float * q_met, int m,
                         const observer & observe) {
    const stopwatch watch(probe_stage);
    const int64_t E = hp.n_channels();
    const int impl = actqkv_impl_best(), threads = reading.n_threads;
    const actqkv_method & method = reading.method;
    probe_stage.bytes += (uint64_t) m * E * sizeof(float);
    if (is_decode) {
        std::copy_n(q_met, E, probe.data());
        return;
    }
    if (method.probe == ACTQKV_PROBE_BIAS) {
        const bool published = method.statistics == ACTQKV_STATISTICS_PUBLISHED;
        memory.mean.resize(E);
        memory.var.resize(E);
        actqkv_running running = memory.running();
        actqkv_probe_update(impl, &running, q_far, m, E, published, method.statistics_cap, threads);
        actqkv_probe_weights(impl, &running, q_far, m, E, bias.data(), weights.data(), threads);
        memory.n_tokens = running.n_tokens;
        memory.n_windows = running.n_windows;
        traced.bias = bias.data();
        if (observe) {
            observe("mean", memory.mean.data(), E, 1, 1);
            observe("var", memory.var.data(), E, 1, 1);
            observe("bias", bias.data(), m, 1, 1);
        }
    }
    if (method.probe == ACTQKV_PROBE_MEAN || memory.n_windows <= method.probe_warmup) {
        std::fill_n(weights.data(), m, 1.0f / m);
    }
    traced.weights = weights.data();
    actqkv_probe_mix(impl, q_met, weights.data(), m, E, probe.data(), threads);
    if (observe) {
        observe("weights", weights.data(), m, 1, 1);
    }
}

void planner::make_scores(int il, const layer_memory & memory, const kv_store & store) {
    const stopwatch watch(score_stage);
    const actqkv_method & method = now().method;
    if (method.summary == ACTQKV_SUMMARY_SPREAD) {
        make_spread_scores(il, store);
        return;
    }
    const auto against = [&](const std::vector<float> & query, bool cosine, std::vector<float> & out) {
        fold(hp, method.summary, query.data(), folded);
        const float norm = std::sqrt(std::inner_product(query.begin(), query.end(), query.begin(), 0.0f));
        out.resize(n_chunks);
        actqkv_score(actqkv_impl_best(), folded.data(), norm, store.summaries(il), cosine ? store.norms(il) : nullptr,
                     n_chunks, store.width(), 1.0f, out.data(), reading.n_threads);
        score_stage.bytes += (uint64_t) n_chunks * store.width() * sizeof(actqkv_f16);
    };
    against(probe, method.score == ACTQKV_SCORE_COSINE, scores);
    if (method.question_weight > 0.0f && !memory.question.empty() && !is_decode) {
        against(memory.question, true, question_scores);
        for (int64_t b = 0; b < n_chunks; b++) {
            scores[b] += method.question_weight * question_scores[b];
        }
    }
}

void planner::make_spread_scores(int il, const kv_store & store) {
    folded.resize(actqkv_spread_query_size(hp.n_head_kv, hp.d_head));
    actqkv_spread_query(probe.data(), hp.n_head, hp.n_head_kv, hp.d_head, folded.data());
    scores.resize(n_chunks);
    // Waking threads takes longer than a few chunks do.
    const int n_threads = n_chunks * store.summary_bytes() < ALONE_BYTES ? 1 : reading.n_threads;
    actqkv_spread_scores(actqkv_impl_best(), folded.data(), store.spreads(il), n_chunks, hp.n_head_kv, hp.d_head,
                         scores.data(), n_threads);
    score_stage.bytes += (uint64_t) n_chunks * store.summary_bytes();
}

void planner::make_votes(int il, const kv_store & store) {
    const stopwatch watch(score_stage);
    const int impl = actqkv_impl_best();
    split_heads(hp, now().method.summary, probe.data(), folded);
    head_scores.resize(hp.n_head * n_chunks);
    votes.resize(hp.n_head_kv * n_chunks);
    actqkv_head_scores(impl, folded.data(), store.summaries(il), store.row_stride(), store.n_rows(), n_chunks,
                       store.width() / store.n_rows(), hp.n_head, head_scores.data(), reading.n_threads);
    actqkv_vote(impl, head_scores.data(), n_chunks, hp.n_head, hp.n_head_kv, now().method.vote == ACTQKV_VOTE_SUM,
                votes.data(), reading.n_threads);
    score_stage.bytes += (uint64_t) n_chunks * store.width() * sizeof(actqkv_f16);
}

uint64_t planner::search_bytes(const hparams & hp, const actqkv_params & params, int64_t n_chunks) {
    if (!searches(params.method)) {
        return 0;
    }
    const std::vector<actqkv_stretch> index = stretches::most_of(kv_store::layout_for(hp, params), n_chunks);
    actqkv_search_args args = {};
    args.n_head = hp.n_head;
    args.n_head_kv = hp.n_head_kv;
    args.d_head = hp.d_head;
    args.stretches = index.data();
    args.n_stretches = (int32_t) index.size();
    args.n_chunks = n_chunks;
    args.n_cells = stretches::n_cells_most(index);
    args.n_picked = n_picked_of(params.method);
    args.n_threads = params.n_threads;
    const uint64_t of_head = args.n_cells * sizeof(float) + args.n_picked * sizeof(int32_t);
    return hp.n_head * of_head + actqkv_search_scratch(&args);
}

// Votes of all chunks, by the index.
void planner::search(int il, const kv_store & store, const float * query) {
    const int impl = actqkv_impl_best();
    const std::vector<actqkv_stretch> & index = store.index(il);
    const auto since = [start = std::chrono::steady_clock::now()] {
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    };
    scores.resize(n_chunks);
    actqkv_search_args args = {};
    args.n_head = hp.n_head;
    args.n_head_kv = hp.n_head_kv;
    args.d_head = hp.d_head;
    args.scale = hp.attn_scale;
    args.query = query;
    args.stretches = index.data();
    args.n_stretches = (int32_t) index.size();
    args.n_chunks = n_chunks;
    args.n_picked = n_picked_of(now().method);
    args.votes = scores.data();
    args.n_threads = reading.n_threads;
    for (int32_t g = 0; g < hp.n_head_kv; g++) {
        int64_t n_divided;
        const int64_t n = actqkv_search_cells(args.stretches, args.n_stretches, g, hp.d_head, &n_divided);
        args.n_cells = std::max(args.n_cells, n);
        score_stage.bytes += n * (hp.d_head / 2 + 2 * sizeof(float));
    }
    cell_scores.resize(hp.n_head * args.n_cells);
    picked.resize(hp.n_head * args.n_picked);
    search_scratch.resize(actqkv_search_scratch(&args) + 64);
    args.scores = cell_scores.data();
    args.picked = picked.data();
    args.scratch = search_scratch.data() + (64 - (uintptr_t) search_scratch.data() % 64) % 64;
    actqkv_search_score(impl, &args);
    const double scored = since();
    score_stage.ms += scored;
    refine_stage.bytes += actqkv_search_vote(impl, &args);
    refine_stage.ms += since() - scored;
}

int64_t planner::share_of(int il) const {
    const int64_t k = n_retrieved(now());
    return equal_shares ? k
                        : cutoff_share(pool, mean_entropy.data() + il, hp.n_layer - il, k, n_chunks,
                                       now().method.cutoff == ACTQKV_CUTOFF_PUBLISHED);
}

int64_t planner::grant(int il) {
    const int64_t share = share_of(il);
    pool = equal_shares ? pool : std::max<int64_t>(0, pool - share);
    return std::min(share, n_chunks);
}

// Of summaries' scores: a search has none.
bool planner::counts_entropy() const {
    return n_chunks > 1 && !is_searched() && now().method.cutoff != ACTQKV_CUTOFF_NONE;
}

void planner::note_entropy(layer_memory & memory, float entropy) {
    traced.entropy = entropy;
    memory.entropies.push_back(entropy);
    if (memory.entropies.size() > N_ENTROPIES) {
        memory.entropies.erase(memory.entropies.begin());
    }
}

choice planner::choice_of(int il) const {
    const choice c = actqkv::choice_of(now().method, share_of(il), n_chunks);
    return is_decode ? c : choice{c.k, n_chunks, c.k, 0};
}

// The k best chunks by score. Answering, keys of n_refined of them decide; stored_query is the step's as it meets keys in the
// store.
void planner::choose(int il, const choice & sizes, const kv_store & store, const float * stored_query) {
    const stopwatch watch(refine_stage);
    if (sizes.k == n_chunks) {
        choose_all();
        return;
    }
    const int64_t k = sizes.k, n_refined = sizes.n_refined;
    const int32_t c = reading.method.n_chunk_tokens;
    const float scale = hp.attn_scale;
    candidates.resize(n_refined);
    scratch.resize(n_chunks);
    actqkv_top_k(actqkv_impl_best(), scores.data(), n_chunks, (int32_t) n_refined, candidates.data(), scratch.data());
    if (n_refined > k) {
        head_scores.resize(hp.n_head * n_refined);
        store.check_chunks(il, FILE_KEYS, candidates.data(), n_refined);
        actqkv_refine(actqkv_impl_best(), stored_query, reading.kv_type, store.chunk_keys(il), candidates.data(),
                      (int32_t) n_refined, hp.n_head, hp.n_head_kv, hp.d_head, c, scale, head_scores.data(),
                      reading.n_threads);
        refine_stage.bytes += (uint64_t) n_refined * store.layout().chunk_bytes();
        keep_candidates(k);
    }
    chosen.chunks = candidates;
    chosen.n = (int32_t) k;
}

void planner::choose_all() {
    chosen.n = (int32_t) n_chunks;
    chosen.chunks.resize(n_chunks);
    std::iota(chosen.chunks.begin(), chosen.chunks.end(), 0);
}

// Of the candidates, the k to whose best keys all query heads together pay the most attention, by their head_scores.
void planner::keep_candidates(int64_t k) {
    const int64_t n = (int64_t) candidates.size();
    votes.resize(n);
    actqkv_vote(actqkv_impl_best(), head_scores.data(), n, hp.n_head, 1, 1, votes.data(), reading.n_threads);
    kept.resize(k);
    actqkv_top_k(actqkv_impl_best(), votes.data(), n, (int32_t) k, kept.data(), scratch.data());
    for (int32_t & chunk : kept) {
        chunk = candidates[chunk];
    }
    candidates.swap(kept);
}

// The k best chunks of each list, by scores [n_lists][n_chunks].
void planner::choose_each(const float * list_scores, int64_t k, int32_t n_lists) {
    chosen.n = (int32_t) k;
    chosen.n_lists = n_lists;
    chosen.chunks.resize(n_lists * k);
    scratch.resize(n_chunks);
    for (int32_t i = 0; i < n_lists; i++) {
        actqkv_top_k(actqkv_impl_best(), list_scores + i * n_chunks, n_chunks, chosen.n, chosen.chunks.data() + i * k,
                     scratch.data());
    }
}

void planner::plan_by_score(int il, layer_memory & memory, const kv_store & store, const float * query,
                            const float * stored_query, const observer & observe) {
    const bool per_head = now().method.granularity == ACTQKV_GRANULARITY_KV_HEAD;
    const choice sizes = choice_of(il);
    if (per_head) {
        make_votes(il, store);
    } else if (!is_searched()) {
        make_scores(il, memory, store);
    } else if (sizes.k < n_chunks) {
        search(il, store, query);
    }
    if (counts_entropy()) {
        const float h = actqkv_entropy(actqkv_impl_best(), scores.data(), n_chunks, now().method.cutoff_temperature);
        note_entropy(memory, h);
        if (observe) {
            observe("entropy", &h, 1, 1, 1);
        }
    }
    const int64_t k = grant(il);
    if (per_head) {
        choose_each(votes.data(), k, hp.n_head_kv);
    } else {
        choose(il, sizes, store, stored_query);
    }
    if (observe) {
        const float share = (float) k;
        const std::vector<float> ids(chosen.chunks.begin(), chosen.chunks.end());
        observe("probe", probe.data(), (int64_t) probe.size(), 1, 1);
        if (per_head) {
            observe("head_scores", head_scores.data(), n_chunks, hp.n_head, 1);
            observe("votes", votes.data(), n_chunks, hp.n_head_kv, 1);
        } else if (!is_searched() || sizes.k < n_chunks) {
            observe("scores", scores.data(), n_chunks, 1, 1);
        }
        observe("share", &share, 1, 1, 1);
        observe(per_head ? "plans" : "plan", ids.data(), k, chosen.n_lists, 1);
    }
}

void planner::plan_by_mass(const mass_source & true_mass, const observer & observe) {
    const int32_t n_lists = now().method.granularity == ACTQKV_GRANULARITY_KV_HEAD ? hp.n_head_kv : 1;
    const std::vector<double> & mass = true_mass(n_lists > 1);
    scores.assign(mass.begin(), mass.end());
    choose_each(scores.data(), std::min<int64_t>(n_retrieved(now()), n_chunks), n_lists);
    if (observe) {
        const std::vector<float> ids(chosen.chunks.begin(), chosen.chunks.end());
        observe("mass", scores.data(), n_chunks, n_lists, 1);
        observe(n_lists > 1 ? "plans" : "plan", ids.data(), chosen.n, n_lists, 1);
    }
}

bool planner::is_open(int il, const kv_store & store) const {
    const actqkv_method & method = now().method;
    const bool by_spreads = store.summarises() && method.summary == ACTQKV_SUMMARY_SPREAD;
    return is_decode && n_chunks > 0 && retrieval_of(il) == ACTQKV_RETRIEVE_TOP &&
           method.granularity == ACTQKV_GRANULARITY_LAYER && (is_searched() || by_spreads);
}

const chunk_plan & planner::take(int il, layer_memory & memory, std::vector<int32_t> chunks, float entropy) {
    traced = {nullptr, nullptr, NAN};
    if (counts_entropy()) {
        note_entropy(memory, entropy);
    }
    grant(il);
    chosen.n = (int32_t) chunks.size();
    chosen.n_lists = 1;
    chosen.chunks = std::move(chunks);
    return chosen;
}

const float * planner::met_by_summaries(const float * q_far, const float * q_near) const {
    const bool rotated = now().method.summary_keys == ACTQKV_KEYS_ATTENDED;
    return rotated ? met_by_keys(q_far, q_near) : q_far;
}

const float * planner::met_by_keys(const float * q_far, const float * q_near) const {
    return reading.method.positions == ACTQKV_POSITIONS_EXACT ? q_near : q_far;
}

const chunk_plan & planner::plan(int il, layer_memory & memory, const kv_store & store, const float * q_far,
                                 const float * q_near, const float * q_stored, int m, const mass_source & true_mass,
                                 const observer & observe) {
    const int32_t retrieval = retrieval_of(il);
    chosen.n = 0;
    chosen.n_lists = 1;
    traced = {nullptr, nullptr, NAN};
    if (store.summarises() && il >= now().method.n_dense_layers) {
        make_probe(memory, q_far, met_by_summaries(q_far, q_near), m, observe);
    }
    if (retrieval == ACTQKV_RETRIEVE_ALL) {
        choose_all();
    } else if (retrieval == ACTQKV_RETRIEVE_TOP && n_chunks > 0) {
        plan_by_score(il, memory, store, met_by_keys(q_far, q_near), q_stored, observe);
    } else if (retrieval == ACTQKV_RETRIEVE_ORACLE && n_chunks > 0) {
        plan_by_mass(true_mass, observe);
    }
    return chosen;
}

} // namespace actqkv
