/* A row of logits as sampling reads it: by vectors, edited, and as keys that order like logits. */
#pragma once
#include "common/types.cuh"
#include "sampling/slot.cuh"

/* Bits that are always zero in the float of a T. */
template <typename T>
constexpr int LOW_ZERO_BITS = 0;
template <>
constexpr int LOW_ZERO_BITS<bf16> = 16;
template <>
constexpr int LOW_ZERO_BITS<fp16> = 13;

/* An unsigned integer that orders like x; equal for 0 and -0. */
__device__ __forceinline__ uint32 order_of(float x) {
    const uint32 bits = __float_as_uint(x + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

/* Visits tokens [begin, end), read in vectors of VEC, every num_threads-th from the thread's own, UNROLL at a time:
   visit(float (&)[WIDTH], first). */
template <int UNROLL, int VEC, int WIDTH, typename T, typename Visit>
__device__ __forceinline__ void visit_vectors(const T* logits, int begin, int end, int thread, int num_threads,
                                              Visit visit) {
    for (int base = begin + thread * VEC; base < end; base += UNROLL * num_threads * VEC) {
        Vec<T, VEC> loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int first = base + u * num_threads * VEC;
            if (first < end) loaded[u] = load<VEC>(logits + first);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int first = base + u * num_threads * VEC;
            if (first >= end) break;
#pragma unroll
            for (int i = 0; i < VEC; i += WIDTH) {
                float x[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) x[j] = to_float(loaded[u].at[i + j]);
                visit(x, first + i);
            }
        }
    }
}

/* One row of logits, edited. */
template <typename T, int VEC>
struct Row {
    const T* logits;  // [vocab]
    int vocab;
    Edits edits;
    int low_zero_bits;

    __device__ __forceinline__ Row(const T* logits, int vocab, const Edits& edits = Edits())
        : logits(logits), vocab(vocab), edits(edits), low_zero_bits(edits.is_any ? 0 : LOW_ZERO_BITS<T>) {}

    static constexpr int WIDTH = VEC < 4 ? VEC : 4;  // with more at once, registers spill

    /* visit(float (&)[WIDTH], first) for the tokens [begin, end) that are the lane's, unless all of the WIDTH lie below
       `from`; begin % 32 == 0. A warp together visits all. */
    template <typename Visit>
    __device__ __forceinline__ void visit(int begin, int end, float from, Visit visit) const {
        visit_vectors<1, VEC, WIDTH>(logits, begin, min(end, vocab), threadIdx.x % 32, 32, [&](float(&x)[WIDTH], int first) {
            if (edits.is_any) edits.apply(x, first);
            float top = x[0];
#pragma unroll
            for (int j = 1; j < WIDTH; ++j) top = fmaxf(top, x[j]);
            if (!(top < from)) visit(x, first);
        });
    }

    __device__ __forceinline__ float at(int id) const {
        float x[1] = {to_float(logits[id])};
        if (edits.is_any) edits.apply(x, id);
        return x[0];
    }

    /* Keys order like logits, and neighbouring logits have neighbouring keys. */
    __device__ __forceinline__ uint32 key(float x) const { return order_of(x) >> low_zero_bits; }

    __device__ __forceinline__ float logit(uint32 key) const {
        const uint32 order = key << low_zero_bits;
        return __uint_as_float(order >> 31 ? order ^ 0x80000000u : ~order & ~0u << low_zero_bits);
    }

    /* The smallest key of a logit that is at least x. */
    __device__ __forceinline__ uint32 key_from(float x) const { return key(x) + (logit(key(x)) < x); }
};

/* Tokens by rank: a larger logit first, of equals the lower id. A token survives a cut if its rank is at least that. */
__device__ __forceinline__ uint64 rank_of(uint32 key, int id) { return static_cast<uint64>(key) << 32 | ~uint32(id); }

/* A cut in terms of logits. */
struct Survivors {
    float from;  // where the cut is
    uint32 last;  // the highest id of a survivor there

    template <typename Row>
    __device__ __forceinline__ Survivors(const Row& row, uint64 cut)
        : from(fmaxf(row.logit(cut >> 32), minus_infinity_logit())), last(~uint32(cut)) {}  // keys below -inf are NaN

    __device__ __forceinline__ bool include(float x, int id) const { return x > from || (x == from && id <= last); }
};
