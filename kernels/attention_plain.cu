/* Attention in float32 arithmetic throughout, for float32 models and for shapes the tensor-core kernels do not take.
   out[t, h] = softmax(scale * q[t, h] . K) V, over the keys that t sees
   any T, any block size, head_dim up to 32 * ITEMS; prefill, decode and any mixture
   grid (num_tokens, num_heads), block (32 * WARPS): a block computes one row of out
   A warp takes every WARPS-th batch of keys, its lanes the elements lane + 32 * i of a row; the warps merge at the end.
   bound: memory for few query tokens, 2 * keys * num_heads * head_dim * sizeof(T) bytes; else shuffles, 5 a key and row */
#include "common/attention.cuh"
#include "common/overlap.cuh"

constexpr int WARPS = 8;
constexpr int BATCH = 4;  // keys in flight per warp

/* The last sequence that begins at or before a token; sequences without tokens are passed over. */
__device__ __forceinline__ int sequence_of_token(const AttentionInputs& in, int token) {
    int low = 0, high = in.num_seqs - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (in.query_start[middle] <= token) low = middle;
        else high = middle - 1;
    }
    return low;
}

template <typename T, int ITEMS>
__device__ __forceinline__ void load_row(float (&row)[ITEMS], const T* from, int head_dim) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int d = threadIdx.x % WARP_SIZE + i * WARP_SIZE;
        row[i] = d < head_dim ? to_float(from[d]) : 0.0f;
    }
}

template <typename T, int ITEMS>
__global__ void __launch_bounds__(32 * WARPS) attention_plain(AttentionInputs in) {
    __shared__ float warp_outs[WARPS][32 * ITEMS];
    __shared__ float2 warp_stats[WARPS];  // maximum, sum
    overlap_launches();
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const int token = blockIdx.x, head = blockIdx.y, kv_head = head / in.group();
    const int seq = sequence_of_token(in, token);
    const Sequence s(in, seq);
    const ScoreScale scale(in);
    const int begin = s.begin_key(token - s.first_token, in.window), end = s.end_key(token - s.first_token);

    float q[ITEMS], out[ITEMS] = {};
    load_row(q, static_cast<const T*>(in.q) + token * in.q_token_stride + (int64)head * in.head_dim, in.head_dim);
    float maximum = minus_infinity(), sum = 0.0f;
    for (int first = begin + warp * BATCH; first < end; first += WARPS * BATCH) {
        float scores[BATCH], values[BATCH][ITEMS], top = maximum;
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int key = min(first + j, end - 1);
            const int64 offset = offset_of_key(in, block_of_key(in, seq, key), key, kv_head);
            float k[ITEMS], dot = 0.0f;
            load_row(k, static_cast<const T*>(in.k_cache) + offset, in.head_dim);
            load_row(values[j], static_cast<const T*>(in.v_cache) + offset, in.head_dim);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) dot += q[i] * k[i];
            scores[j] = first + j < end ? scale.capped(warp_sum(dot)) : minus_infinity();
            top = fmaxf(top, scores[j]);
        }
        const float shrink = exp2f((maximum - top) * scale.factor);  // 0 the first time
        maximum = top;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) out[i] *= shrink;
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const float weight = exp2f((scores[j] - top) * scale.factor);
            sum += weight;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) out[i] += weight * values[j][i];
        }
    }

    if (lane == 0) warp_stats[warp] = make_float2(maximum, sum);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) warp_outs[warp][lane + i * WARP_SIZE] = out[i];
    __syncthreads();
    float top = minus_infinity(), total = 0.0f;
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, warp_stats[w].x);
    top = finite_or_zero(top);
    for (int w = 0; w < WARPS; ++w) total += warp_stats[w].y * exp2f((warp_stats[w].x - top) * scale.factor);
    for (int d = threadIdx.x; d < in.head_dim; d += blockDim.x) {
        float merged = 0.0f;
        for (int w = 0; w < WARPS; ++w) merged += warp_outs[w][d] * exp2f((warp_stats[w].x - top) * scale.factor);
        const int64 to = ((int64)token * in.num_heads + head) * in.head_dim + d;
        static_cast<T*>(in.out)[to] = from_float<T>(total > 0.0f ? merged / total : 0.0f);
    }
}
