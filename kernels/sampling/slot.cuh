/* What a slot's request asks of sampling, and how it edits its logits.
   The host writes these records: see the dtypes in cupy_engine/cuda_slot.py. */
#pragma once
#include "common/types.cuh"

using uint16 = unsigned short;
using uint64 = unsigned long long;

constexpr uint16 IN_PROMPT = 0x8000;  // the bit of a token's count that says so; the bits below count it in the output

/* A token that the request singles out. */
struct Edit {
    static constexpr int IS_STOP = 1;       // forbidden before first_stop_position
    static constexpr int ENDS_BAD_WORD = 2;  // forbidden now, since the tokens before it begin a bad word
    int token;
    int flags;
    float bias;
};

/* A bad word of several tokens: what stands before its last token, and the edit of the last. */
struct BadWord {
    int begin;  // in word_tokens
    int length;
    int edit;
};

struct Slot {
    uint64 seed;
    double top_p;           // 1 keeps all tokens
    double min_p_distance;  // how far below the best a logit may lie
    double repetition, inverse_repetition, frequency, presence;
    const uint32* forbidden;  // bits [V] of tokens never to be drawn, or null
    const uint32* listed;     // bits [V] of tokens that have an edit, or null
    Edit* edits;              // [num_edits], by ascending token
    uint16* counts;           // [V], or null if nothing is penalized
    const BadWord* words;     // [num_words]
    const int* word_tokens;
    int* recent;  // [num_recent], the last tokens: the one at position p is at p % num_recent
    float factor, factor_rest;  // log2(e) / temperature is their sum; 0 means greedy
    int top_k;                  // 0 keeps all tokens
    int first_stop_position;
    int always_edits;  // whether logits change at every position, not only before first_stop_position
    int num_edits, num_words, num_recent;
};
static_assert(sizeof(Slot) == 144, "the host's records are as long");

__device__ __forceinline__ float minus_infinity_logit() { return __int_as_float(0xff800000); }

/* The edits of one draw: bad words, allowed tokens, stop tokens, biases, penalties, in this order. */
struct Edits {
    const Slot* slot;
    bool is_early, is_any;

    __device__ __forceinline__ Edits() : slot(nullptr), is_early(false), is_any(false) {}

    __device__ __forceinline__ Edits(const Slot* slot, int position)
        : slot(slot), is_early(position < slot->first_stop_position), is_any(is_early || slot->always_edits) {}

    /* Edits the logits x of N tokens from first on; first % N == 0. */
    template <int N>
    __device__ __forceinline__ void apply(float (&x)[N], int first) const {
        const uint32 forbidden = slot->forbidden ? slot->forbidden[first / 32] >> (first % 32) : 0;
        uint32 changed = slot->listed ? slot->listed[first / 32] >> (first % 32) & ((1u << N) - 1) : 0;
        if (slot->counts) {
            const Vec<uint16, N> seen = load<N>(slot->counts + first);
#pragma unroll
            for (int j = 0; j < N; ++j) changed |= (seen.at[j] != 0) << j;
        }
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (forbidden >> j & 1) x[j] = minus_infinity_logit();
        for (changed &= ~forbidden; changed; changed &= changed - 1) {
            const int changing = __ffs(changed) - 1;
            float logit = x[0];
#pragma unroll
            for (int j = 1; j < N; ++j) logit = j == changing ? x[j] : logit;
            logit = edited(logit, first + changing);
#pragma unroll
            for (int j = 0; j < N; ++j) x[j] = j == changing ? logit : x[j];
        }
    }

   private:
    __device__ __forceinline__ float edited(float x, int token) const {
        if (slot->listed && slot->listed[token / 32] >> (token % 32) & 1) {
            const Edit edit = edit_of(token);
            const int forbidding = Edit::ENDS_BAD_WORD | (is_early ? Edit::IS_STOP : 0);
            x = edit.flags & forbidding ? minus_infinity_logit() : x + edit.bias;
        }
        const uint16 seen = slot->counts ? slot->counts[token] : 0;
        return seen ? penalized(x, seen) : x;
    }

    __device__ __forceinline__ Edit edit_of(int token) const {
        int low = 0, high = slot->num_edits - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (slot->edits[middle].token < token) low = middle + 1;
            else high = middle;
        }
        return slot->edits[low];
    }

    /* In float64 like the reference, so that equal logits stay equal. */
    __device__ __forceinline__ float penalized(float x, uint16 seen) const {
        const int count = seen & (IN_PROMPT - 1);
        double value = x * (x > 0.0f ? slot->inverse_repetition : slot->repetition);
        value -= slot->frequency * count + slot->presence * (count > 0);
        return static_cast<float>(fmin(value, 3.4028234663852886e38));
    }
};
