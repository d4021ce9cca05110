// probe - one query that stands for a window, weighted by how unusual its tokens are (docs/algorithms.md 3.1, 3.2; ActQKV).
//
//     pooled:     s2 <- (N s2 + m v + D^2 N m/(N+m)) / (N+m)               mu <- mu + D m/(N+m)
//     published:  s2 <- (s2 (t - 1/m) + v + D^2/(1 + 1/t)) / (t + 1 - 1/m)  mu <- (mu t + u)/(t + 1)
//     bias_i = mean over channels of (z_i - mu)^2 / (s2 + mean(s2)/100)     w_i = bias_i / sum bias
//     probe  = sum_i w_i z_i
//
// u, v: mean and population variance of the window's m tokens, D = u - mu, N tokens and t windows seen. First window:
// mu = u, s2 = v (published: v m/(m-1)). The window's moments are taken in two passes, in f32: no cancellation.
#include <math.h>

#include "ops.h"
#include "parallel.h"

namespace actqkv {

constexpr int N_BLOCK = 256; // channels at a time: their statistics stay on the stack and in the first-level cache

static void column_stats_scalar(const float * z, int64_t ldz, int32_t m, int64_t n, float * mean, float * var) {
    for (int64_t e = 0; e < n; e++) {
        double u = 0, v = 0;
        for (int32_t i = 0; i < m; i++) {
            u += z[i * ldz + e];
        }
        u /= m;
        for (int32_t i = 0; i < m; i++) {
            v += (z[i * ldz + e] - u) * (z[i * ldz + e] - u);
        }
        mean[e] = (float) u;
        var[e] = (float) (v / m);
    }
}

static float weighted_distance_scalar(const float * z, const float * mean, const float * inv, int64_t n) {
    double sum = 0;
    for (int64_t e = 0; e < n; e++) {
        const double delta = (double) z[e] - mean[e];
        sum += delta * delta * inv[e];
    }
    return (float) sum;
}

static void add_scaled_scalar(float * dst, const float * src, int64_t n, float factor) {
    for (int64_t e = 0; e < n; e++) {
        dst[e] += factor * src[e];
    }
}

// mu and s2 of one channel become a_mu*mu + b_mu*u and a_s2*s2 + b_s2*v + c_s2*(u - mu)^2.
struct update {
    double a_mu, b_mu, a_s2, b_s2, c_s2;
};

static update update_of(const actqkv_running * running, int32_t m, int32_t published, int32_t cap) {
    if (running->n_windows == 0) {
        const double b_s2 = !published ? 1 : m > 1 ? (double) m / (m - 1) : 0;
        return {0, 1, 0, b_s2, 0};
    }
    if (published) {
        const double t = running->n_windows < cap ? (double) running->n_windows : (double) cap;
        const double n = t + 1 - 1.0 / m;
        return {t / (t + 1), 1 / (t + 1), (t - 1.0 / m) / n, 1 / n, 1 / ((1 + 1 / t) * n)};
    }
    const double past = running->n_tokens < 256.0 * cap ? running->n_tokens : 256.0 * cap;
    const double n = past + m;
    return {past / n, m / n, past / n, m / n, past * m / (n * n)};
}

static double mean_of(const float * x, int64_t n) {
    double sum = 0;
    for (int64_t e = 0; e < n; e++) {
        sum += x[e];
    }
    return sum / (double) n;
}

static void biases(const ops * ops, const actqkv_running * running, const float * z, int32_t from, int32_t to,
                   int64_t n_channels, float floor, float * bias) {
    for (int32_t i = from; i < to; i++) {
        bias[i] = 0;
    }
    for (int64_t e0 = 0; e0 < n_channels; e0 += N_BLOCK) {
        const int64_t n = n_channels - e0 < N_BLOCK ? n_channels - e0 : N_BLOCK;
        float inv[N_BLOCK];
        for (int64_t e = 0; e < n; e++) {
            inv[e] = 1 / ((running->var[e0 + e] + floor) * (float) n_channels);
        }
        for (int32_t i = from; i < to; i++) {
            bias[i] += (ops ? ops->weighted_distance : weighted_distance_scalar)(z + i * n_channels + e0,
                                                                                 running->mean + e0, inv, n);
        }
    }
}

} // namespace actqkv

extern "C" void actqkv_probe_update(int32_t impl, actqkv_running * running, const float * z, int32_t m,
                                    int64_t n_channels, int32_t published, int32_t cap, int32_t n_threads) {
    const actqkv::ops * ops = actqkv::ops_for(impl);
    const actqkv::update f = actqkv::update_of(running, m, published, cap);
    const bool first = running->n_windows == 0; // whatever the arrays hold then is not read
    actqkv::parallel(n_threads, [=](int ith, int nth) {
        const int64_t n_blocks = (n_channels + actqkv::N_BLOCK - 1) / actqkv::N_BLOCK;
        for (int64_t block = n_blocks * ith / nth; block < n_blocks * (ith + 1) / nth; block++) {
            const int64_t e0 = block * actqkv::N_BLOCK;
            const int64_t n = n_channels - e0 < actqkv::N_BLOCK ? n_channels - e0 : actqkv::N_BLOCK;
            float u[actqkv::N_BLOCK], v[actqkv::N_BLOCK];
            (ops ? ops->column_stats : actqkv::column_stats_scalar)(z + e0, n_channels, m, n, u, v);
            for (int64_t e = 0; e < n; e++) {
                const double mu = first ? 0 : running->mean[e0 + e];
                const double s2 = first ? 0 : running->var[e0 + e];
                running->mean[e0 + e] = (float) (f.a_mu * mu + f.b_mu * u[e]);
                running->var[e0 + e] = (float) (f.a_s2 * s2 + f.b_s2 * v[e] + f.c_s2 * (u[e] - mu) * (u[e] - mu));
            }
        }
    });
    const double most = 256.0 * cap;
    running->n_tokens = running->n_tokens + m < most ? running->n_tokens + m : most;
    running->n_windows++;
}

extern "C" void actqkv_probe_weights(int32_t impl, const actqkv_running * running, const float * z, int32_t m,
                                     int64_t n_channels, float * bias, float * weights, int32_t n_threads) {
    const actqkv::ops * ops = actqkv::ops_for(impl);
    const double mean_var = actqkv::mean_of(running->var, n_channels);
    double sum = 0;
    if (mean_var > 0 && isfinite(mean_var)) {
        actqkv::parallel(n_threads, [=](int ith, int nth) {
            actqkv::biases(ops, running, z, m * ith / nth, m * (ith + 1) / nth, n_channels, (float) (mean_var / 100),
                           bias);
        });
        sum = actqkv::mean_of(bias, m) * m;
    } else {
        for (int32_t i = 0; i < m; i++) {
            bias[i] = 0;
        }
    }
    const bool usable = sum > 0 && isfinite(sum);
    for (int32_t i = 0; i < m; i++) {
        weights[i] = (float) (usable ? bias[i] / sum : 1.0 / m);
    }
}

extern "C" void actqkv_probe_mix(int32_t impl, const float * z, const float * weights, int32_t m, int64_t n_channels,
                                 float * probe, int32_t n_threads) {
    const actqkv::ops * ops = actqkv::ops_for(impl);
    actqkv::parallel(n_threads, [=](int ith, int nth) {
        const int64_t from = n_channels * ith / nth;
        const int64_t to = n_channels * (ith + 1) / nth;
        for (int64_t e0 = from; e0 < to; e0 += actqkv::N_BLOCK) {
            const int64_t n = to - e0 < actqkv::N_BLOCK ? to - e0 : actqkv::N_BLOCK;
            float acc[actqkv::N_BLOCK] = {0};
            for (int32_t i = 0; i < m; i++) {
                (ops ? ops->add_scaled : actqkv::add_scaled_scalar)(acc, z + i * n_channels + e0, n, weights[i]);
            }
            for (int64_t e = 0; e < n; e++) {
                probe[e0 + e] = acc[e];
            }
        }
    });
}
