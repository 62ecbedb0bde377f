/* RMSNorm and LayerNorm, with the residual addition before them if ADD:
       residual += x;  h = residual          (rounded to T, as the next layer will read it)
       RMSNorm:    out = h * weight / sqrt(mean(h^2) + eps)
       LayerNorm:  out = (h - mean(h)) * weight / sqrt(mean((h - mean(h))^2) + eps) + bias          (CENTER)
   x, residual, out [num_tokens, hidden] T, rows contiguous; weight, bias [hidden] T; accumulates in float32
   grid (num_tokens), block (a multiple of 32 in 32..512, at least hidden / VEC / ITEMS); a thread keeps ITEMS vectors in registers
   requires hidden % VEC == 0 and, for VEC > 1, arrays aligned to VEC elements; out may be x
   bound: memory, 2 * num_tokens * hidden * sizeof(T) bytes, twice that with ADD */
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"

template <typename T, int VEC, int ITEMS, bool ADD, bool CENTER>
__global__ void __launch_bounds__(512)
norm(T* out, const T* x, T* residual, const T* weight, const T* bias, float eps, int hidden) {
    __shared__ float scratch[2][WARP_SIZE];
    const int64 row = (int64)blockIdx.x * hidden;
    const int num_vecs = hidden / VEC;
    float h[ITEMS][VEC];
    Vec<T, VEC> weights[ITEMS], biases[ITEMS];
    overlap_launches();

#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int vec = threadIdx.x + i * blockDim.x;
        if (vec >= num_vecs) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) h[i][j] = 0.0f;
            continue;
        }
        Vec<T, VEC> values = load<VEC>(x + row + vec * VEC);
        weights[i] = load<VEC>(weight + vec * VEC);
        if (CENTER) biases[i] = load<VEC>(bias + vec * VEC);
        if (ADD) {
            const Vec<T, VEC> before = load<VEC>(residual + row + vec * VEC);
#pragma unroll
            for (int j = 0; j < VEC; ++j) values.at[j] = from_float<T>(to_float(values.at[j]) + to_float(before.at[j]));
            store(residual + row + vec * VEC, values);
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) h[i][j] = to_float(values.at[j]);
    }

    float mean = 0.0f;
    if (CENTER) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum += h[i][j];
        mean = block_sum(sum, scratch[0]) / hidden;
    }

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (threadIdx.x + i * blockDim.x >= num_vecs) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) squares += (h[i][j] - mean) * (h[i][j] - mean);
    }
    const float scale = rsqrtf(block_sum(squares, scratch[1]) / hidden + eps);

#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int vec = threadIdx.x + i * blockDim.x;
        if (vec >= num_vecs) continue;
        Vec<T, VEC> result;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const float normed = (h[i][j] - mean) * scale * to_float(weights[i].at[j]);
            result.at[j] = from_float<T>(CENTER ? normed + to_float(biases[i].at[j]) : normed);
        }
        store(out + row + vec * VEC, result);
    }
}
