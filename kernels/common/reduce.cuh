/* Sums and maxima over a warp or a block; every thread gets the result. */
#pragma once

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP_SIZE = 32;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = WARP_SIZE / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(FULL_WARP, x, mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int mask = WARP_SIZE / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, mask));
    return x;
}

/* scratch: WARP_SIZE floats of shared memory, free again when the block next synchronizes. blockDim.x % 32 == 0. */
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, num_warps = blockDim.x / WARP_SIZE;
    x = warp_sum(x);
    if (num_warps == 1) return x;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < num_warps ? scratch[lane] : 0.0f);
}
