/* The matrix product of a few rows:  out[m, n] = sum over k of x[m, k] * weight[n, k]  (+ bias[n])
   x [M, k] T, rows x_stride elements apart; weight [n, k] T, bias [n] T or null; out [M, n] Out; accumulates in float32
   grid (ceil(n / (WARPS * ROWS))), block (32 * WARPS): a warp computes ROWS columns of out, UNROLL * ROWS loads in flight
   requires k % VEC == 0, x_stride % VEC == 0, x and weight aligned to 16 bytes
   bound: memory, n * k * sizeof(T) bytes */
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"

constexpr int WARPS = 4;

/* 16 bytes of a matrix that is read once. */
template <typename T, int VEC>
__device__ __forceinline__ Vec<T, VEC> load_streaming(const T* from) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Vec<T, VEC>*>(&bits);
}

template <typename T, int M, int ROWS, int UNROLL, typename Out>
__global__ void __launch_bounds__(32 * WARPS)
gemv(Out* out, const T* x, const T* weight, const T* bias, int n, int k, int64 x_stride) {
    constexpr int VEC = 16 / sizeof(T), STEP = WARP_SIZE * VEC;
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const int first = (blockIdx.x * WARPS + warp) * ROWS;
    const T* rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rows[r] = weight + (int64)min(first + r, n - 1) * k;

    Vec<T, VEC> weights[UNROLL][ROWS];
    const auto load_weights = [&](int i) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (i + u * STEP < k) weights[u][r] = load_streaming<T, VEC>(rows[r] + i + u * STEP);
    };
    release_successor();
    load_weights(lane * VEC);
    await_predecessors();
    if (first >= n) return;

    float sums[M][ROWS] = {};
    for (int i = lane * VEC; i < k; i += STEP * UNROLL) {
        if (i >= STEP) load_weights(i);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (i + u * STEP >= k) break;
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const Vec<T, VEC> values = load<VEC>(x + m * x_stride + i + u * STEP);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int j = 0; j < VEC; ++j) sums[m][r] += to_float(values.at[j]) * to_float(weights[u][r].at[j]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = warp_sum(sums[m][r]);
            if (lane == 0 && first + r < n)
                out[(int64)m * n + first + r] = from_float<Out>(bias ? sum + to_float(bias[first + r]) : sum);
        }
}
