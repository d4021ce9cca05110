// extern "C" shims: arguments in, exceptions out as status + message. No logic.
#include "../error.h"
#include "../kernels/kernels.h"
#include "../kernels/parallel.h"
#include "../model/extra_buffers.h"
#include "../session/session.h"

#include <cstring>
#include <new>

struct actqkv_session {
    actqkv::session impl;
};

namespace {

int32_t report(actqkv_error * err, int32_t status, const char * message) {
    if (err != nullptr) {
        err->status = status;
        snprintf(err->message, sizeof(err->message), "%s", message);
    }
    return status;
}

template <typename F> int32_t guarded(actqkv_error * err, F && f) {
    try {
        f();
        return report(err, ACTQKV_OK, "");
    } catch (const actqkv::error & e) {
        return report(err, e.status, e.what());
    } catch (const std::bad_alloc &) {
        return report(err, ACTQKV_ERR_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return report(err, ACTQKV_ERR_INTERNAL, e.what());
    }
}

void require(bool holds, const char * what) {
    if (!holds) {
        throw actqkv::error(ACTQKV_ERR_ARGUMENT, what);
    }
}

} // namespace

int32_t actqkv_method_table(int32_t i, actqkv_method * method) {
    const auto & table = actqkv::method_table();
    if (method != nullptr && i >= 0 && i < (int32_t) table.size()) {
        *method = table[i];
    }
    return (int32_t) table.size();
}

int32_t actqkv_method_find(const char * name, actqkv_method * method, actqkv_error * err) {
    return guarded(err, [&] {
        require(name != nullptr && method != nullptr, "name and method must not be NULL");
        *method = actqkv::find_method(name);
    });
}

int32_t actqkv_method_candidates(const actqkv_method * method, int64_t share, int64_t n_chunks, int64_t * n_picked,
                                 int64_t * n_refined, actqkv_error * err) {
    return guarded(err, [&] {
        require(method != nullptr && n_picked != nullptr && n_refined != nullptr, "pointers must not be NULL");
        require(share >= 1 && n_chunks >= 0, "share must be at least 1, n_chunks at least 0");
        const actqkv::choice c = actqkv::choice_of(*method, share, n_chunks);
        *n_picked = c.n_picked;
        *n_refined = c.n_refined;
    });
}

actqkv_params actqkv_default_params(void) { return actqkv::default_params(); }

int32_t actqkv_model_check(const llama_model * model, actqkv_error * err) {
    return guarded(err, [&] {
        require(model != nullptr, "model must not be NULL");
        actqkv::read_weights(model, actqkv::read_hparams(model));
    });
}

int32_t actqkv_memory_plan(const llama_model * model, const actqkv_params * params, actqkv_memory * memory,
                           actqkv_error * err) {
    return guarded(err, [&] {
        require(model != nullptr && params != nullptr && memory != nullptr, "arguments must not be NULL");
        *memory = actqkv::session::memory_plan(model, *params);
    });
}

int32_t actqkv_session_new(const llama_model * model, const actqkv_params * params, actqkv_session ** session,
                           actqkv_error * err) {
    return guarded(err, [&] {
        require(model != nullptr && params != nullptr && session != nullptr, "arguments must not be NULL");
        *session = new actqkv_session{{model, *params}};
    });
}

void actqkv_session_free(actqkv_session * session) { delete session; }

actqkv_params actqkv_session_params(const actqkv_session * session) { return session->impl.parameters(); }

actqkv_params actqkv_session_answering(const actqkv_session * session) { return session->impl.answering_parameters(); }

int32_t actqkv_set_answering(actqkv_session * session, const actqkv_method * method, int32_t budget,
                             actqkv_error * err) {
    return guarded(err, [&] {
        require(method != nullptr, "method must not be NULL");
        session->impl.set_answering(*method, budget);
    });
}

int64_t actqkv_n_past(const actqkv_session * session) { return session->impl.past().size(); }

int64_t actqkv_n_chunks(const actqkv_session * session) { return session->impl.n_chunks(); }

int32_t actqkv_history(const actqkv_session * session, int64_t from, int64_t n, int32_t * tokens, int8_t * phases,
                       actqkv_error * err) {
    return guarded(err, [&] {
        const actqkv::history & past = session->impl.past();
        if (from < 0 || n < 0 || from > past.size() || n > past.size() - from) {
            throw actqkv::error(ACTQKV_ERR_ARGUMENT,
                                actqkv::format("tokens %lld to %lld, the history has %lld", (long long) from,
                                               (long long) (from + n), (long long) past.size()));
        }
        if (tokens != nullptr) {
            std::copy_n(past.tokens.begin() + from, n, tokens);
        }
        if (phases != nullptr) {
            std::copy_n(past.phases.begin() + from, n, phases);
        }
    });
}

int32_t actqkv_decode(actqkv_session * session, const int32_t * tokens, int64_t n, int32_t phase, float * logits,
                      int64_t n_logits, actqkv_error * err) {
    return guarded(err, [&] {
        require(n >= 0 && (tokens != nullptr || n == 0), "tokens must not be NULL");
        require(phase >= ACTQKV_PREFILL && phase <= ACTQKV_QUESTION, "phase is not one of enum actqkv_phase");
        require(n_logits >= 0 && n_logits <= n && (logits != nullptr || n_logits == 0),
                "n_logits must be 0 to n, with room for them");
        if (!session->impl.decode(tokens, n, phase, logits, n_logits)) {
            throw actqkv::error(ACTQKV_ERR_CANCELLED, "cancelled; what was read is kept");
        }
    });
}

int32_t actqkv_rewind(actqkv_session * session, int64_t n_past, actqkv_error * err) {
    return guarded(err, [&] {
        const int64_t n = session->impl.past().size();
        if (n_past < 0 || n_past > n) {
            throw actqkv::error(ACTQKV_ERR_ARGUMENT, actqkv::format("rewind to %lld, the history has %lld tokens",
                                                                    (long long) n_past, (long long) n));
        }
        session->impl.rewind(n_past);
    });
}

int32_t actqkv_checkpoint(actqkv_session * session, actqkv_error * err) {
    return guarded(err, [&] { session->impl.keep_checkpoint(); });
}

int32_t actqkv_repeat(actqkv_session * session, int64_t n_tokens, actqkv_error * err) {
    return guarded(err, [&] { session->impl.repeat(n_tokens); });
}

void actqkv_set_progress(actqkv_session * session, actqkv_progress_fn fn, void * user) {
    session->impl.progress = fn;
    session->impl.progress_user = user;
}

void actqkv_set_observer(actqkv_session * session, actqkv_observe_fn fn, void * user) {
    session->impl.watcher = fn;
    session->impl.watcher_user = user;
}

int32_t actqkv_set_recorder(actqkv_session * session, actqkv_record_fn fn, void * user, int32_t mass,
                            actqkv_error * err) {
    return guarded(err, [&] {
        require(mass >= ACTQKV_MASS_NONE && mass <= ACTQKV_MASS_ALL, "mass is not one of enum actqkv_mass");
        session->impl.set_recorder(fn, user, mass);
    });
}

int32_t actqkv_set_audit(actqkv_session * session, int32_t every, actqkv_error * err) {
    return guarded(err, [&] {
        require(every >= 0, "audit is every N steps, N at least 0");
        session->impl.set_audit(every);
    });
}

int32_t actqkv_use_gpu(actqkv_session * session, const actqkv_cuda * cuda, int32_t device, uint64_t limit_bytes,
                       actqkv_error * err) {
    return guarded(err, [&] {
        require(cuda != nullptr, "cuda must not be NULL");
        session->impl.use_gpu(*cuda, device, limit_bytes);
    });
}

int32_t actqkv_gpu_memory_plan(const llama_model * model, const actqkv_params * params, const actqkv_cuda * cuda,
                               struct actqkv_gpu_memory * plan, actqkv_error * err) {
    return guarded(err, [&] {
        require(model != nullptr && params != nullptr && cuda != nullptr && plan != nullptr,
                "arguments must not be NULL");
        *plan = actqkv::session::gpu_plan(model, *params, *cuda);
    });
}

const char * actqkv_gpu_problem(const actqkv_session * session) { return session->impl.gpu_problem().c_str(); }

uint64_t actqkv_state_size(const actqkv_session * session) { return session->impl.state_size(); }

int32_t actqkv_state_get(const actqkv_session * session, uint8_t * data, uint64_t size, actqkv_error * err) {
    return guarded(err, [&] {
        require(data != nullptr, "data must not be NULL");
        session->impl.state_get(data, size);
    });
}

int32_t actqkv_state_set(actqkv_session * session, const uint8_t * data, uint64_t size, actqkv_error * err) {
    return guarded(err, [&] {
        require(data != nullptr, "data must not be NULL");
        session->impl.state_set(data, size);
    });
}

int32_t actqkv_file_info(const char * path, struct actqkv_file_info * info, actqkv_error * err) {
    return guarded(err, [&] {
        require(path != nullptr && info != nullptr, "path and info must not be NULL");
        const actqkv::kv_file file = actqkv::kv_file::open(path, false);
        const actqkv::file_header & head = file.header();
        const actqkv::file_slot & last = file.last();
        *info = {head.params,   head.n_tokens,          last.n_done,        last.n_closed,
                 last.complete, (int32_t) head.version, head.section_bytes, file.bytes()};
    });
}

int32_t actqkv_file_read(const char * path, int32_t * tokens, int8_t * phases, uint8_t * section, actqkv_error * err) {
    return guarded(err, [&] {
        require(path != nullptr, "path must not be NULL");
        const actqkv::kv_file file = actqkv::kv_file::open(path, false);
        if (tokens != nullptr) {
            std::copy(file.tokens().begin(), file.tokens().end(), tokens);
        }
        if (phases != nullptr) {
            std::copy(file.phases().begin(), file.phases().end(), phases);
        }
        if (section != nullptr) {
            const std::vector<uint8_t> bytes = file.section();
            std::copy(bytes.begin(), bytes.end(), section);
        }
    });
}

int32_t actqkv_file_verify(const char * path, actqkv_progress_fn progress, void * user, actqkv_error * err) {
    return guarded(err, [&] {
        require(path != nullptr, "path must not be NULL");
        if (!actqkv::verify_file(path, progress, user)) {
            throw actqkv::error(ACTQKV_ERR_CANCELLED, "cancelled");
        }
    });
}

int32_t actqkv_session_open(const llama_model * model, const char * path, int32_t n_ctx, int32_t n_threads, bool write,
                            actqkv_session ** session, actqkv_error * err) {
    return guarded(err, [&] {
        require(model != nullptr && path != nullptr && session != nullptr, "arguments must not be NULL");
        *session = new actqkv_session{{model, std::string(path), n_ctx, n_threads, write}};
    });
}

int32_t actqkv_file_begin(actqkv_session * session, const char * path, const int32_t * tokens, const int8_t * phases,
                          int64_t n_tokens, const uint8_t * section, uint64_t section_bytes, int32_t checkpoint_tokens,
                          actqkv_error * err) {
    return guarded(err, [&] {
        require(path != nullptr, "path must not be NULL");
        require(n_tokens > 0 && tokens != nullptr && phases != nullptr, "a KV file is of at least one token");
        require(section != nullptr || section_bytes == 0, "section must not be NULL");
        actqkv::history reading = {{tokens, tokens + n_tokens}, {phases, phases + n_tokens}};
        session->impl.file_begin(path, std::move(reading), section, section_bytes, checkpoint_tokens);
    });
}

int32_t actqkv_file_spill(actqkv_session * session, bool on, actqkv_error * err) {
    return guarded(err, [&] { session->impl.file_spill(on); });
}

int32_t actqkv_file_sync(actqkv_session * session, actqkv_error * err) {
    return guarded(err, [&] { session->impl.file_sync(); });
}

int32_t actqkv_file_end(actqkv_session * session, actqkv_error * err) {
    return guarded(err, [&] { session->impl.file_end(); });
}

void actqkv_file_leave(actqkv_session * session) { session->impl.file_leave(); }

void actqkv_sources_begin(actqkv_session * session) { session->impl.begin_sources(); }

int64_t actqkv_sources_end(actqkv_session * session, double * weights, int64_t n) {
    const std::vector<double> found = session->impl.end_sources();
    std::copy_n(found.begin(), std::min<int64_t>(n, (int64_t) found.size()), weights);
    return (int64_t) found.size();
}

actqkv_stats actqkv_stats_get(const actqkv_session * session) { return session->impl.stats(); }

void actqkv_stats_reset(actqkv_session * session) { session->impl.reset_stats(); }

int32_t actqkv_try_extra_buffers(actqkv_error * err) {
    return guarded(err, [] { actqkv::try_extra_buffers(); });
}

int32_t actqkv_has_threads(void) { return actqkv::has_threads; }

const char * actqkv_kernel_name(void) {
    switch (actqkv_impl_best()) {
    case ACTQKV_IMPL_AVX512_VNNI:
        return "avx512-vnni";
    case ACTQKV_IMPL_AVX512:
        return "avx512";
    case ACTQKV_IMPL_AVX2:
        return "avx2";
    case ACTQKV_IMPL_NEON:
        return "neon";
    default:
        return "scalar";
    }
}
