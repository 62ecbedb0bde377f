/* Probabilities as integers, so that their sums are exact and do not depend on order; and the random numbers. */
#pragma once
#include "common/types.cuh"
#include "sampling/slot.cuh"

constexpr int WEIGHT_BITS = 43;  // the best token weighs 2^43; the sum over 2^20 tokens stays below 2^64

/* weight(x) = 2^43 * exp((x - best) / temperature), rounded down. */
struct Weights {
    float best, factor, factor_rest;

    /* How many times less likely than the best, as a power of two; does not fall as x falls. */
    __device__ __forceinline__ float octaves_below(float x) const { return (best - x) * factor; }

    __device__ __forceinline__ uint64 of(float x) const {
        const float distance = best - x, octaves = distance * factor;
        // What the product and the factor lost to rounding, which would tilt the sum over a large vocabulary.
        const float lost = fmaf(distance, factor_rest, fmaf(distance, factor, -octaves));
        const float power = exp2f(-octaves);
        const float weight = octaves < WEIGHT_BITS ? fminf(fmaf(power, lost * -0.69314718f, power), 1.0f) : 0.0f;
        const uint32 bits = __float_as_uint(weight);
        // The mantissa as a multiple of 2^43, shifted by the exponent.
        const uint32 high = bits >> 12 & 0x7ff | 0x800, low = bits << 20;
        return (static_cast<uint64>(high) << 32 | low) >> min(127 - (bits >> 23), 63u);
    }
};

/* The smallest integer that is at least share * total, rounded like the reference's float64. */
__device__ __forceinline__ uint64 share_of(double share, uint64 total) {
    return __double2ull_ru(share * __ull2double_rn(total));
}

/* 53 random bits in the top of 64, a pure function of (seed, position): Philox4x32-10 (Salmon et al., SC 2011). */
__device__ __forceinline__ uint64 random_bits(uint64 seed, int position) {
    uint32 c0 = position, c1 = 0, c2 = 0, c3 = 0;
    uint32 k0 = seed, k1 = seed >> 32;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (static_cast<uint64>(c1) << 32 | c0) & ~0x7ffull;
}
