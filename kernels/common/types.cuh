/* Element types, conversion to and from float, and vectors of up to 16 bytes that move in one instruction. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bf16 = __nv_bfloat16;
using fp16 = __half;
using int64 = long long;
using uint8 = unsigned char;
using uint32 = unsigned int;
using uint64 = unsigned long long;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

/* N consecutive elements, aligned to their size. Indexed by compile-time constants only, so that it stays in registers. */
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
    static_assert(sizeof(T) * N <= 16, "a vector moves in one instruction of at most 16 bytes");
    T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& values) {
    *reinterpret_cast<Vec<T, N>*>(to) = values;
}

/* Keeps an index from the outside inside [0, count), so that a bad one cannot reach foreign memory. */
template <typename I>
__device__ __forceinline__ I clamp_index(I index, I count) {
    return index < 0 ? 0 : index >= count ? count - 1 : index;
}
