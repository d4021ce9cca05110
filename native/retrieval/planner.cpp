#include "planner.h"

#include "method.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace actqkv {
namespace {

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

} // namespace

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

planner::planner(const hparams & hp, const actqkv_params & params)
    : hp(hp), params(params), mean_entropy(hp.n_layer), bias(params.n_window), weights(params.n_window),
      probe(hp.n_channels()) {}

void planner::begin_window(const std::vector<layer_memory> & memory, int64_t n, bool decode) {
    const bool published = params.method.cutoff == ACTQKV_CUTOFF_PUBLISHED;
    const int64_t k = n_retrieved(params);
    n_chunks = n;
    is_decode = decode;
    pool = hp.n_layer * (published ? k : std::min(k, n_chunks));
    bool full = true; // published: entropies count once every layer has N_ENTROPIES of them
    for (int il = 0; il < hp.n_layer; il++) {
        const std::vector<double> & h = memory[il].entropies;
        mean_entropy[il] = h.empty() ? 0.0 : std::accumulate(h.begin(), h.end(), 0.0) / h.size();
        full = full && h.size() >= N_ENTROPIES;
    }
    if (n_chunks <= 1) {
        std::fill(mean_entropy.begin(), mean_entropy.end(), 0.0); // equal shares
    }
    equal_shares = !is_decode || params.method.cutoff == ACTQKV_CUTOFF_NONE || (published && !full);
}

void planner::make_probe(layer_memory & memory, const float * q_far, int m, const observer & observe) {
    const stopwatch watch(probe_stage);
    const int64_t E = hp.n_channels();
    const int impl = actqkv_impl_best(), threads = params.n_threads;
    probe_stage.bytes += (uint64_t) m * E * sizeof(float);
    if (is_decode) {
        std::copy_n(q_far, E, probe.data());
        return;
    }
    if (params.method.probe == ACTQKV_PROBE_BIAS) {
        const bool published = params.method.statistics == ACTQKV_STATISTICS_PUBLISHED;
        memory.mean.resize(E);
        memory.var.resize(E);
        actqkv_running running = memory.running();
        actqkv_probe_update(impl, &running, q_far, m, E, published, params.method.statistics_cap, threads);
        actqkv_probe_weights(impl, &running, q_far, m, E, bias.data(), weights.data(), threads);
        memory.n_tokens = running.n_tokens;
        memory.n_windows = running.n_windows;
        if (observe) {
            observe("mean", memory.mean.data(), E, 1, 1);
            observe("var", memory.var.data(), E, 1, 1);
            observe("bias", bias.data(), m, 1, 1);
        }
    }
    if (params.method.probe == ACTQKV_PROBE_MEAN || memory.n_windows <= params.method.probe_warmup) {
        std::fill_n(weights.data(), m, 1.0f / m);
    }
    actqkv_probe_mix(impl, q_far, weights.data(), m, E, probe.data(), threads);
    if (observe) {
        observe("weights", weights.data(), m, 1, 1);
    }
}

void planner::make_scores(int il, const layer_memory & memory, const kv_store & store) {
    const stopwatch watch(score_stage);
    const auto against = [&](const std::vector<float> & query, bool cosine, std::vector<float> & out) {
        fold(hp, params.method.summary, query.data(), folded);
        const float norm = std::sqrt(std::inner_product(query.begin(), query.end(), query.begin(), 0.0f));
        out.resize(n_chunks);
        actqkv_score(actqkv_impl_best(), folded.data(), norm, store.summaries(il), cosine ? store.norms(il) : nullptr,
                     n_chunks, store.width(), 1.0f, out.data(), params.n_threads);
        score_stage.bytes += (uint64_t) n_chunks * store.width() * sizeof(actqkv_f16);
    };
    against(probe, params.method.score == ACTQKV_SCORE_COSINE, scores);
    if (params.method.question_weight > 0.0f && !memory.question.empty() && !is_decode) {
        against(memory.question, true, question_scores);
        for (int64_t b = 0; b < n_chunks; b++) {
            scores[b] += params.method.question_weight * question_scores[b];
        }
    }
}

int64_t planner::n_granted(int il, layer_memory & memory, const observer & observe) {
    if (n_chunks > 1 && params.method.cutoff != ACTQKV_CUTOFF_NONE) {
        const float h = actqkv_entropy(actqkv_impl_best(), scores.data(), n_chunks, params.method.cutoff_temperature);
        memory.entropies.push_back(h);
        if (memory.entropies.size() > N_ENTROPIES) {
            memory.entropies.erase(memory.entropies.begin());
        }
        if (observe) {
            observe("entropy", &h, 1, 1, 1);
        }
    }
    const int64_t k = n_retrieved(params);
    if (equal_shares) {
        return std::min(k, n_chunks);
    }
    const int64_t share = cutoff_share(pool, mean_entropy.data() + il, hp.n_layer - il, k, n_chunks,
                                       params.method.cutoff == ACTQKV_CUTOFF_PUBLISHED);
    pool = std::max<int64_t>(0, pool - share);
    return std::min(share, n_chunks);
}

// The k best chunks by score. Answering, the keys of refine * k of them decide; stored_query is the step's query as
// stored keys meet it.
void planner::choose(int il, int64_t k, const kv_store & store, const float * stored_query) {
    const stopwatch watch(refine_stage);
    const int64_t n = is_decode ? std::min<int64_t>(n_chunks, k * params.method.refine) : k;
    candidates.resize(n);
    scratch.resize(n_chunks);
    actqkv_top_k(scores.data(), n_chunks, (int32_t) n, candidates.data(), scratch.data());
    if (n == k) {
        chosen.swap(candidates);
        return;
    }
    refined.resize(n);
    actqkv_refine(actqkv_impl_best(), stored_query, store.chunk_keys(il), store.chunk_stride(), candidates.data(),
                  (int32_t) n, hp.n_head, hp.n_head_kv, hp.d_head, params.n_chunk_tokens, refined.data(),
                  params.n_threads);
    refine_stage.bytes += (uint64_t) n * store.chunk_stride() * sizeof(actqkv_f16);
    chosen.resize(k);
    actqkv_top_k(refined.data(), n, (int32_t) k, chosen.data(), scratch.data());
    for (int32_t & chunk : chosen) {
        chunk = candidates[chunk];
    }
}

const std::vector<int32_t> & planner::plan(int il, layer_memory & memory, const kv_store & store, const float * q_far,
                                           const float * q_near, int m, const observer & observe) {
    const int32_t retrieval = is_decode ? params.method.decode : params.method.prefill;
    chosen.clear();
    if (store.summarises()) {
        make_probe(memory, q_far, m, observe);
    }
    if (retrieval == ACTQKV_RETRIEVE_ALL) {
        chosen.resize(n_chunks);
        std::iota(chosen.begin(), chosen.end(), 0);
    } else if (retrieval == ACTQKV_RETRIEVE_TOP && n_chunks > 0) {
        make_scores(il, memory, store);
        const int64_t k = n_granted(il, memory, observe);
        choose(il, k, store, params.method.positions == ACTQKV_POSITIONS_EXACT ? q_near : q_far);
        if (observe) {
            const float share = (float) k;
            const std::vector<float> ids(chosen.begin(), chosen.end());
            observe("probe", probe.data(), (int64_t) probe.size(), 1, 1);
            observe("scores", scores.data(), n_chunks, 1, 1);
            observe("share", &share, 1, 1, 1);
            observe("plan", ids.data(), k, 1, 1);
        }
    }
    return chosen;
}

} // namespace actqkv
