/* Sums of 64-bit integers over a block of 1024 threads, and who of them reaches a goal. */
#pragma once
#include "common/reduce.cuh"
#include "sampling/slot.cuh"

constexpr int BLOCK_THREADS = 1024;

struct ScanScratch {
    uint64 warp_totals[WARP_SIZE];
    uint64 before;
    int index;
};

struct Scan {
    uint64 own, up_to, total;  // the thread's value, the sum up to and with it, the sum of all
};

struct Found {
    int index;      // the thread
    uint64 before;  // the sum of those before it
};

__device__ __forceinline__ uint64 warp_sum(uint64 x) {
#pragma unroll
    for (int mask = WARP_SIZE / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(FULL_WARP, x, mask);
    return x;
}

__device__ __forceinline__ uint64 warp_scan(uint64 x) {
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
        const uint64 before = __shfl_up_sync(FULL_WARP, x, distance);
        if (threadIdx.x % WARP_SIZE >= distance) x += before;
    }
    return x;
}

/* All threads. Whatever shared memory they wrote before, all can read after it. */
__device__ __forceinline__ Scan scan_block(uint64 x, ScanScratch& scratch) {
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const uint64 in_warp = warp_scan(x);
    __syncthreads();
    if (lane == WARP_SIZE - 1) scratch.warp_totals[warp] = in_warp;
    __syncthreads();
    const uint64 totals = warp_scan(scratch.warp_totals[lane]);
    const uint64 before = __shfl_sync(FULL_WARP, totals, max(warp - 1, 0));
    return {x, in_warp + (warp ? before : 0), __shfl_sync(FULL_WARP, totals, WARP_SIZE - 1)};
}

/* The first thread at which the sum reaches the goal; 0 < goal <= total. All threads. */
__device__ __forceinline__ Found find_reaching(const Scan& scan, uint64 goal, ScanScratch& scratch) {
    if (scan.up_to >= goal && scan.up_to - scan.own < goal)
        scratch.index = threadIdx.x, scratch.before = scan.up_to - scan.own;
    __syncthreads();
    return {scratch.index, scratch.before};
}
