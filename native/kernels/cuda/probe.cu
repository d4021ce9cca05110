// probe - one query that stands for a window; formulas: ../cpu/probe.cpp.
//
// Blocks of WARP channels x N_SLICES slices of the window's rows: reads of z are coalesced, slices are added in order.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int N_SLICES = 8;

// mu and s2 of one channel become a_mu*mu + b_mu*u and a_s2*s2 + b_s2*v + c_s2*(u - mu)^2.
struct update {
    double a_mu, b_mu, a_s2, b_s2, c_s2;
    bool first; // what the arrays hold is not read
};

update update_of(const actqkv_running & running, int32_t m, bool published, int32_t cap) {
    if (running.n_windows == 0) {
        return {0, 1, 0, !published ? 1 : m > 1 ? (double) m / (m - 1) : 0, 0, true};
    }
    if (published) {
        const double t = running.n_windows < cap ? (double) running.n_windows : (double) cap;
        const double n = t + 1 - 1.0 / m;
        return {t / (t + 1), 1 / (t + 1), (t - 1.0 / m) / n, 1 / n, 1 / ((1 + 1 / t) * n), false};
    }
    const double past = running.n_tokens < 256.0 * cap ? running.n_tokens : 256.0 * cap;
    const double n = past + m;
    return {past / n, m / n, past / n, m / n, past * m / (n * n), false};
}

// Sum over the slices of x; every thread of a channel gets it. sums: shared.
__device__ float join_slices(float x, float (*sums)[WARP]) {
    sums[threadIdx.y][threadIdx.x] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < N_SLICES; i++) {
        sum += sums[i][threadIdx.x];
    }
    __syncthreads();
    return sum;
}

__global__ void update_kernel(update f, const float * z, int m, int64_t n_channels, float * mean, float * var) {
    __shared__ float sums[N_SLICES][WARP];
    const int64_t e = (int64_t) blockIdx.x * WARP + threadIdx.x;
    const bool mine = e < n_channels;
    float sum = 0;
    for (int i = (int) threadIdx.y; mine && i < m; i += N_SLICES) {
        sum += z[i * n_channels + e];
    }
    const float u = join_slices(sum, sums) / (float) m;
    sum = 0;
    for (int i = (int) threadIdx.y; mine && i < m; i += N_SLICES) {
        const float delta = z[i * n_channels + e] - u;
        sum += delta * delta;
    }
    const float v = join_slices(sum, sums) / (float) m;
    if (mine && threadIdx.y == 0) {
        const double mu = f.first ? 0 : mean[e], s2 = f.first ? 0 : var[e];
        mean[e] = (float) (f.a_mu * mu + f.b_mu * u);
        var[e] = (float) (f.a_s2 * s2 + f.b_s2 * v + f.c_s2 * (u - mu) * (u - mu));
    }
}

// A block per token.
__global__ void bias_kernel(const float * mean, const float * var, const float * z, int64_t n_channels, float * bias) {
    __shared__ double wide_part[WARP];
    __shared__ float part[WARP];
    double total = 0;
    for (int64_t e = threadIdx.x; e < n_channels; e += blockDim.x) {
        total += var[e];
    }
    const double mean_var = sum_block(total, wide_part) / (double) n_channels;
    const bool usable = mean_var > 0 && isfinite(mean_var);
    const float floor = (float) (mean_var / 100);
    const float * token = z + (int64_t) blockIdx.x * n_channels;
    float sum = 0;
    for (int64_t e = threadIdx.x; usable && e < n_channels; e += blockDim.x) {
        const float delta = token[e] - mean[e];
        sum += delta * delta / ((var[e] + floor) * (float) n_channels);
    }
    sum = sum_block(sum, part);
    if (threadIdx.x == 0) {
        bias[blockIdx.x] = sum;
    }
}

// One block: weights from biases.
__global__ void weights_kernel(const float * bias, int m, float * weights) {
    __shared__ double part[WARP];
    double sum = 0;
    for (int i = (int) threadIdx.x; i < m; i += (int) blockDim.x) {
        sum += bias[i];
    }
    sum = sum_block(sum, part);
    const bool usable = sum > 0 && isfinite(sum);
    for (int i = (int) threadIdx.x; i < m; i += (int) blockDim.x) {
        weights[i] = (float) (usable ? bias[i] / sum : 1.0 / m);
    }
}

__global__ void mix_kernel(const float * z, const float * weights, int m, int64_t n_channels, float * probe) {
    __shared__ float sums[N_SLICES][WARP];
    const int64_t e = (int64_t) blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    for (int i = (int) threadIdx.y; e < n_channels && i < m; i += N_SLICES) {
        sum += weights[i] * z[i * n_channels + e];
    }
    sum = join_slices(sum, sums);
    if (e < n_channels && threadIdx.y == 0) {
        probe[e] = sum;
    }
}

constexpr int THREADS = 256;

} // namespace

int32_t probe_update(actqkv_cuda_stream * s, actqkv_running * running, const float * z, int32_t m, int64_t n_channels,
                     int32_t published, int32_t cap) {
    const int32_t status =
        launch(s, update_kernel, dim3((unsigned) divided_up(n_channels, WARP)), dim3(WARP, N_SLICES), 0,
               update_of(*running, m, published != 0, cap), z, m, n_channels, running->mean, running->var);
    if (status == 0) {
        const double most = 256.0 * cap;
        running->n_tokens = running->n_tokens + m < most ? running->n_tokens + m : most;
        running->n_windows++;
    }
    return status;
}

int32_t probe_weights(actqkv_cuda_stream * s, const actqkv_running * running, const float * z, int32_t m,
                      int64_t n_channels, float * bias, float * weights) {
    const int32_t status =
        launch(s, bias_kernel, dim3((unsigned) m), dim3(THREADS), 0, running->mean, running->var, z, n_channels, bias);
    return status != 0 ? status : launch(s, weights_kernel, dim3(1), dim3(THREADS), 0, bias, m, weights);
}

int32_t probe_mix(actqkv_cuda_stream * s, const float * z, const float * weights, int32_t m, int64_t n_channels,
                  float * probe) {
    return launch(s, mix_kernel, dim3((unsigned) divided_up(n_channels, WARP)), dim3(WARP, N_SLICES), 0, z, weights, m,
                  n_channels, probe);
}

} // namespace actqkv::cuda
