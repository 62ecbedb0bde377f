/* Log-probabilities of given tokens, and of the most likely ones beside each, from raw logits. */
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"
#include "sampling/row.cuh"
#include "sampling/select.cuh"
#include "sampling/weights.cuh"

constexpr int MAX_TOP = 32;

/* The largest logit of a row; NaN if there is one. All threads. */
template <typename Row>
__device__ float best_logit(const Row& row, float* warp_bests) {
    float best = minus_infinity_logit();
    bool has_nan = false;
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    for (int begin = warp * TILE; begin < row.vocab; begin += BLOCK_THREADS / WARP_SIZE * TILE)
        row.visit(begin, begin + TILE, minus_infinity_logit(), [&](const float(&x)[Row::WIDTH], int) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) best = fmaxf(best, x[j]), has_nan |= x[j] != x[j];
        });
    best = warp_max(best);
    if (lane == 0) warp_bests[warp] = best;
    has_nan = __syncthreads_or(has_nan);
    return has_nan ? __int_as_float(0x7fffffff) : warp_max(warp_bests[lane]);
}

/* Row n of the output, for token token_ids[n] and logits row rows[n]:
       ids[n] = [token, the num_top most likely], logprobs[n] = theirs, ranks[n] = 1 + the number of tokens more likely
   If num_top > vocab, the rest is -1 and NaN. Logits that are not finite, or a token outside the vocabulary, give NaN,
   rank 0 and ids 0 after the token.
   logits [num_rows, vocab] T, rows contiguous; ids int, logprobs float [N, 1 + num_top]; ranks [N] int
   grid (N), block (1024)
   requires num_top <= 32, vocab <= 2^20 and, for VEC > 1, vocab % VEC == 0 and logits aligned to VEC elements
   bound: memory; reads a row twice, and twice more for the most likely */
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
token_logprobs(int* ids, float* logprobs, int* ranks, const T* logits, const int* rows, const int* token_ids, int num_rows,
               int vocab, int num_top) {
    __shared__ Selection selection;
    __shared__ float warp_bests[WARP_SIZE];
    __shared__ uint64 total, top[MAX_TOP];
    __shared__ int num_better, num_found;
    overlap_launches();
    const int n = blockIdx.x, t = threadIdx.x, token = token_ids[n];
    ids += n * (1 + num_top), logprobs += n * (1 + num_top);
    const Row<T, VEC> row(logits + static_cast<int64>(clamp_index(rows[n], num_rows)) * vocab, vocab);

    selection.reset();
    if (t == 0) total = num_better = num_found = 0;
    const float best = best_logit(row, warp_bests);
    const bool is_valid = fabsf(best) < __int_as_float(0x7f800000) && token >= 0 && token < vocab;
    if (!is_valid) {
        if (t <= num_top) ids[t] = t == 0 ? token : 0, logprobs[t] = __int_as_float(0x7fffffff);
        if (t == 0) ranks[n] = 0;
        return;
    }

    const float chosen = to_float(row.logits[token]);
    const Weights weights{best, 1.44269502f, 1.9259630e-8f};
    uint64 mass = 0;
    uint32 better = 0;
    for (int begin = t / WARP_SIZE * TILE; begin < vocab; begin += BLOCK_THREADS / WARP_SIZE * TILE)
        row.visit(begin, begin + TILE, minus_infinity_logit(), [&](const float(&x)[Row<T, VEC>::WIDTH], int) {
#pragma unroll
            for (int j = 0; j < Row<T, VEC>::WIDTH; ++j) mass += weights.of(x[j]), better += x[j] > chosen;
        });
    mass = warp_sum(mass), better = __reduce_add_sync(FULL_WARP, better);
    if (t % WARP_SIZE == 0) atomicAdd(&total, mass), atomicAdd(&num_better, static_cast<int>(better));

    uint64 cut = 0;
    if (num_top) cut = cut_prefix(selection, row, weights, 0, true, [=](uint64) { return static_cast<uint64>(num_top); });
    const Survivors survivors(row, cut);
    for (int tile = t / WARP_SIZE; num_top && tile * TILE < vocab; tile += BLOCK_THREADS / WARP_SIZE) {
        if (selection.tile_top[tile] < survivors.from) continue;
        row.visit(tile * TILE, (tile + 1) * TILE, survivors.from, [&](const float(&x)[Row<T, VEC>::WIDTH], int first) {
#pragma unroll
            for (int j = 0; j < Row<T, VEC>::WIDTH; ++j)
                if (survivors.include(x[j], first + j))
                    top[atomicAdd(&num_found, 1) % MAX_TOP] = rank_of(row.key(x[j]), first + j);
        });
    }
    __syncthreads();
    const double log_total = best + log(static_cast<double>(total)) - WEIGHT_BITS * 0.6931471805599453;
    if (t == 0) ids[0] = token, logprobs[0] = chosen - log_total, ranks[n] = 1 + num_better;
    if (t >= num_top) return;
    const int num_listed = min(num_top, vocab);
    if (t >= num_listed) {
        ids[1 + t] = -1, logprobs[1 + t] = __int_as_float(0x7fffffff);
        return;
    }
    int place = 1;
    for (int i = 0; i < num_listed; ++i) place += top[i] > top[t];
    ids[place] = ~static_cast<uint32>(top[t]);
    logprobs[place] = row.logit(top[t] >> 32) - log_total;
}
