/* Sampling: one token per draw, from logits edited as the draw's slot asks (see sampling/slot.cuh).
   N draws over R rows of logits [R, V] T, rows contiguous; draw n reads row rows[n] for the slot slots[n], whose token at
   positions[n] is drawn; a slot outside [0, num_slots) marks padding, for which nothing is read or written.
   T = float, bf16 or fp16; for VEC > 1, V % VEC == 0 and logits aligned to VEC elements; V <= 2^20

       seat_slots    the host's records ──▶ slots
       set_masks     the host's masks ──▶ what guided slots may draw next
       best_tokens   logits ──▶ the best token of each part of each draw's row
       draw_tokens   parts ──▶ greedy: the best of them; else softmax, min-p, top-k, top-p, inverse CDF; then the slot's state */
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"
#include "sampling/row.cuh"
#include "sampling/select.cuh"
#include "sampling/slot.cuh"
#include "sampling/weights.cuh"

constexpr int NOT_FINITE = -1, NOTHING_ALLOWED = -2;  // in place of a token

/* The best token among some, of equals the one with the lowest id. */
struct Best {
    float raw;    // the largest logit before edits; NaN if there is one
    float logit;  // the token's, after edits
    int token;

    __device__ __forceinline__ void merge(const Best& other) {
        if (other.raw > raw || other.raw != other.raw) raw = other.raw;
        if (other.logit > logit || (other.logit == logit && other.token < token))
            logit = other.logit, token = other.token;
    }

    __device__ __forceinline__ void merge_warp() {
#pragma unroll
        for (int mask = WARP_SIZE / 2; mask > 0; mask /= 2)
            merge({__shfl_xor_sync(FULL_WARP, raw, mask), __shfl_xor_sync(FULL_WARP, logit, mask),
                   __shfl_xor_sync(FULL_WARP, token, mask)});
    }
};

__device__ __forceinline__ Best no_best() { return {minus_infinity_logit(), minus_infinity_logit(), 0x7fffffff}; }

/* By all threads of the block. */
__device__ __forceinline__ void copy_words(Slot* to, const Slot* from) {
    static_assert(sizeof(Slot) % sizeof(int) == 0);
    for (int i = threadIdx.x; i < sizeof(Slot) / sizeof(int); i += blockDim.x)
        reinterpret_cast<int*>(to)[i] = reinterpret_cast<const int*>(from)[i];
}

/* parts[n, s] = the best token of part s of draw n's row: part_size tokens, the last part less
   grid (num_parts, N), block (a multiple of 32 up to 256); part_size % 32 == 0
   bound: memory, N * V * sizeof(T) bytes */
template <typename T, int VEC>
__global__ void __launch_bounds__(256)
best_tokens(Best* parts, const T* logits, const int* rows, const int* draw_slots, const int* positions, const Slot* slots,
            int num_rows, int num_slots, int vocab, int part_size) {
    __shared__ Best warp_bests[WARP_SIZE];
    overlap_launches();
    const int draw = blockIdx.y, slot = draw_slots[draw];
    if (slot < 0 || slot >= num_slots) return;
    const T* row = logits + static_cast<int64>(clamp_index(rows[draw], num_rows)) * vocab;
    const Edits edits(slots + slot, positions[draw]);
    const int begin = blockIdx.x * part_size, end = min(begin + part_size, vocab);

    Best best = no_best();
    bool has_nan = false;
    float raw = minus_infinity_logit();
    const auto absorb = [&](const float(&x)[VEC], int first) {
#pragma unroll
        for (int j = 0; j < VEC; ++j)
            if (x[j] > best.logit) best.logit = x[j], best.token = first + j;
    };
    if (edits.is_any) {
        visit_vectors<1, VEC, VEC>(row, begin, end, threadIdx.x, blockDim.x, [&](float(&x)[VEC], int first) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) raw = fmaxf(raw, x[j]), has_nan |= x[j] != x[j];
            edits.apply(x, first);
            absorb(x, first);
        });
    } else {
        visit_vectors<4, VEC, VEC>(row, begin, end, threadIdx.x, blockDim.x, [&](float(&x)[VEC], int first) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) has_nan |= x[j] != x[j];
            absorb(x, first);
        });
        raw = best.logit;
    }
    best.raw = has_nan ? __int_as_float(0x7fffffff) : raw;

    best.merge_warp();
    if (threadIdx.x % WARP_SIZE == 0) warp_bests[threadIdx.x / WARP_SIZE] = best;
    __syncthreads();
    if (threadIdx.x >= WARP_SIZE) return;
    best = threadIdx.x < blockDim.x / WARP_SIZE ? warp_bests[threadIdx.x] : no_best();
    best.merge_warp();
    if (threadIdx.x == 0) parts[draw * gridDim.x + blockIdx.x] = best;
}

/* Softmax at a temperature, cut by min-p, top-k and top-p, and the inverse of the cumulative distribution in vocabulary
   order. best: the largest logit. All threads of the block. */
template <typename Row>
__device__ int draw_randomly(Selection& s, const Row& row, const Slot& slot, float best, const int& position) {
    const Weights weights{best, slot.factor, slot.factor_rest};
    s.reset();
    uint64 cut = 0;
    if (slot.min_p_distance < 1e300) cut = rank_of(row.key_from(__double2float_ru(best - slot.min_p_distance)), -1);
#pragma unroll 1
    for (int is_top_p = 0; is_top_p < 2; ++is_top_p) {
        if (is_top_p ? slot.top_p >= 1.0 : slot.top_k == 0) continue;
        cut = cut_prefix(s, row, weights, cut, !is_top_p, [&](uint64 total) {
            return is_top_p ? share_of(slot.top_p, total) : static_cast<uint64>(slot.top_k);
        });
    }
    const uint64 bits = random_bits(slot.seed, position);
    const Survivors survivors(row, cut);
    const auto mass = [&](float x, int id) {
        const uint64 weight = weights.of(x);
        return survivors.include(x, id) ? weight : 0;
    };
    return first_reaching(s, row, survivors.from, mass, [=](uint64 total) { return __umul64hi(bits, total) + 1; });
}

/* Notes a token drawn in its slot: counts it, and finds which bad words the next token could complete. All threads. */
__device__ void record(const Slot& slot, int token, int position) {
    if (threadIdx.x == 0) {
        if (slot.counts && (slot.counts[token] & (IN_PROMPT - 1)) < IN_PROMPT - 1) ++slot.counts[token];
        if (slot.num_recent) slot.recent[position % slot.num_recent] = token;
    }
    if (slot.num_words == 0) return;
    for (int i = threadIdx.x; i < slot.num_words; i += blockDim.x)
        atomicAnd(&slot.edits[slot.words[i].edit].flags, ~Edit::ENDS_BAD_WORD);
    __syncthreads();
    for (int i = threadIdx.x; i < slot.num_words; i += blockDim.x) {
        const BadWord word = slot.words[i];
        bool is_begun = word.length <= position + 1;
        for (int j = 0; is_begun && j < word.length; ++j)
            is_begun = slot.recent[(position - j) % slot.num_recent] == slot.word_tokens[word.begin + word.length - 1 - j];
        if (is_begun) atomicOr(&slot.edits[word.edit].flags, Edit::ENDS_BAD_WORD);
    }
}

/* tokens[n] = the token drawn, or NOT_FINITE, or NOTHING_ALLOWED; last_tokens[slots[n]] = it, or 0 if there is none
   grid (N), block (1024)
   bound: memory; reads a row once more where there is a temperature, and about twice more to cut it */
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
draw_tokens(int* tokens, int* last_tokens, const Best* parts, const T* logits, const int* rows, const int* draw_slots,
            const int* positions, const Slot* slots, int num_parts, int num_rows, int num_slots, int vocab) {
    __shared__ Selection selection;
    __shared__ Slot slot;
    __shared__ int position;
    overlap_launches();
    const int draw = blockIdx.x;
    if (draw_slots[draw] < 0 || draw_slots[draw] >= num_slots) return;
    copy_words(&slot, slots + draw_slots[draw]);
    if (threadIdx.x == 0) position = positions[draw];
    __syncthreads();

    Best best = no_best();
    for (int i = threadIdx.x % WARP_SIZE; i < num_parts; i += WARP_SIZE) best.merge(parts[draw * num_parts + i]);
    best.merge_warp();
    int token = best.token;
    if (!(fabsf(best.raw) < __int_as_float(0x7f800000))) {
        token = NOT_FINITE;
    } else if (best.logit == minus_infinity_logit()) {
        token = NOTHING_ALLOWED;
    } else if (slot.factor > 0.0f) {
        const T* row_logits = logits + static_cast<int64>(clamp_index(rows[draw], num_rows)) * vocab;
        const Row<T, VEC> row(row_logits, vocab, Edits(&slot, position));
        token = draw_randomly(selection, row, slot, best.logit, position);
    }
    if (threadIdx.x == 0) {
        tokens[draw] = token;
        last_tokens[draw_slots[draw]] = max(token, 0);
    }
    if (token >= 0) record(slot, token, position);
}

/* What the host says about a slot; lists and tokens are in page-locked host memory, which the device reads in place. */
struct SlotUpdate {
    Slot slot;
    const int* lists;   // [num_list_words], copied to list_target
    int* list_target;
    const int* tokens;  // [num_tokens], of which num_prompt_tokens are the prompt's: counted if slot.counts
    int num_list_words, num_tokens, num_prompt_tokens, index;
};
static_assert(sizeof(SlotUpdate) == 184, "the host's records are as long");

/* slots[updates[i].index] = updates[i].slot, with what it points to
   updates [num_updates], in page-locked host memory; no index twice
   grid (num_updates), block (1024) */
__global__ void __launch_bounds__(1024)
seat_slots(Slot* slots, const SlotUpdate* updates, int num_slots, int vocab) {
    overlap_launches();
    const SlotUpdate& update = updates[blockIdx.x];
    const Slot& slot = update.slot;
    if (update.index < 0 || update.index >= num_slots) return;
    copy_words(slots + update.index, &slot);
    for (int i = threadIdx.x; i < update.num_list_words; i += blockDim.x) update.list_target[i] = update.lists[i];
    if (!slot.counts) return;
    uint32* pairs = reinterpret_cast<uint32*>(slot.counts);  // two counts a word, so that atomics can reach them
    for (int i = threadIdx.x; i < (vocab + 1) / 2; i += blockDim.x) pairs[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < update.num_tokens; i += blockDim.x) {
        const int token = update.tokens[i];
        if (token < 0 || token >= vocab) continue;
        const int shift = 16 * (token % 2);
        if (i < update.num_prompt_tokens) {
            atomicOr(&pairs[token / 2], static_cast<uint32>(IN_PROMPT) << shift);
            continue;
        }
        uint32 before = pairs[token / 2], seen;
        do {
            seen = before;
            if ((seen >> shift & (IN_PROMPT - 1)) == IN_PROMPT - 1) break;
            before = atomicCAS(&pairs[token / 2], seen, seen + (1u << shift));
        } while (before != seen);
    }
}

/* The bits that slots[indices[i]].forbidden points to = masks[i]
   indices [num_masks], no index twice, masks [num_masks, num_words], in page-locked host memory
   grid (num_masks), block (any)
   bound: the bus to the host, 4 * num_masks * num_words bytes */
__global__ void __launch_bounds__(1024)
set_masks(const Slot* slots, const int* indices, const uint32* masks, int num_slots, int num_words) {
    overlap_launches();
    const int index = indices[blockIdx.x];
    if (index < 0 || index >= num_slots) return;
    uint32* forbidden = const_cast<uint32*>(slots[index].forbidden);
    if (!forbidden) return;
    const uint32* mask = masks + static_cast<int64>(blockIdx.x) * num_words;
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) forbidden[i] = mask[i];
}
