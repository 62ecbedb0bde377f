/* Merging softmaxes over different keys: of a block's warps, then of the blocks that share a segment.
   Parts with maxima m_i, sums s_i and unnormalized outputs o_i make  sum_i w_i o_i / sum_i w_i s_i,
   w_i = exp2(factor * (m_i - max m)). */
#pragma once
#include "attention_units.cuh"

/* Memory for segments that several blocks share. Block b stores the part of a segment that began before its share in
   slot 2b, of one that begins in it in slot 2b + 1. */
struct Partials {
    float* out;      // [2 * gridDim.x, COLS, D], not yet divided by the sum
    float2* stats;   // [2 * gridDim.x, COLS]: maximum, sum
    int* arrivals;   // [segments], all zero before and after
};

/* One query row's four neighbouring outputs, gathered from parts. */
struct Merged {
    float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
    float maximum = minus_infinity(), sum = 0.0f;

    /* stats: maximum, sum. */
    template <int N>
    __device__ __forceinline__ void add(const float2 (&stats)[N], const float4 (&outs)[N], float factor) {
        float top = maximum;
#pragma unroll
        for (int i = 0; i < N; ++i) top = fmaxf(top, stats[i].x);
        const float base = finite_or_zero(top) * factor;
        scale(exp2f(maximum * factor - base));
        maximum = top;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float weight = exp2f(stats[i].x * factor - base);
            sum += weight * stats[i].y;
            out.x += weight * outs[i].x;
            out.y += weight * outs[i].y;
            out.z += weight * outs[i].z;
            out.w += weight * outs[i].w;
        }
    }

    __device__ __forceinline__ void scale(float by) { sum *= by, out.x *= by, out.y *= by, out.z *= by, out.w *= by; }

    template <typename T>
    __device__ __forceinline__ void store_normalized(T* to) {
        scale(sum > 0.0f ? 1.0f / sum : 0.0f);
        Vec<T, 4> values;
        values.at[0] = from_float<T>(out.x), values.at[1] = from_float<T>(out.y);
        values.at[2] = from_float<T>(out.z), values.at[3] = from_float<T>(out.w);
        store(to, values);
    }
};

/* Merges all parts of a segment into its output. All threads of the last block to arrive. */
template <typename T, int D, int COLS>
__device__ void merge_parts(const AttentionInputs& in, const Partials& partials, const Segment& at, int first_block,
                            int num_parts, float factor) {
    constexpr int BATCH = 8;  // parts in flight
    for (int i = threadIdx.x; i < at.num_columns * (D / 4); i += blockDim.x) {
        const int column = i / (D / 4), d = i % (D / 4) * 4;
        Merged merged;
        for (int first = 0; first < num_parts; first += BATCH) {
            float2 stats[BATCH];
            float4 outs[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const int part = min(first + j, num_parts - 1);
                const int64 row = (int64)(2 * (first_block + part) + (part == 0)) * COLS + column;
                stats[j] = __ldcg(partials.stats + row);
                outs[j] = __ldcg(reinterpret_cast<const float4*>(partials.out + row * D + d));
                if (first + j >= num_parts) stats[j].x = minus_infinity();
            }
            merged.add(stats, outs, factor);
        }
        merged.store_normalized(at.out_row<T, D>(in, column) + d);
    }
}

/* To be called by all threads of a block that has stored its part. */
template <typename T, int D, int COLS>
__device__ __forceinline__ void merge_if_last(const AttentionInputs& in, const Partials& partials, const Shares& shares,
                                              const Segment& at, float factor) {
    __shared__ bool is_last;
    const int first_block = at.first_block(shares), num_parts = at.last_block(shares) - first_block + 1;
    int* arrivals = partials.arrivals + at.index;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrivals, 1) == num_parts - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *arrivals = 0;
    merge_parts<T, D, COLS>(in, partials, at, first_block, num_parts, factor);
}
