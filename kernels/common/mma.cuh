/* Warp-wide matrix instructions on 16-bit elements (sm_80): D[16, 8] += A[16, 16] B[16, 8], accumulated in float32.

   Who holds what, lane = 4 * r + c (r = 0..7, c = 0..3), each register a pair of neighbours:
       A  a0 (r, 2c..2c+1)  a1 (r + 8, 2c..)  a2 (r, 2c + 8..)  a3 (r + 8, 2c + 8..)
       B  b0 (2c..2c+1, r)  b1 (2c + 8.., r)
       D  d0, d1 (r, 2c..2c+1)  d2, d3 (r + 8, 2c..2c+1)
   ldmatrix fills register i of lane (r, c) with row r, columns 2c..2c+1 of the 8x8 matrix whose rows lanes 8i..8i+7
   point to; with trans, with rows 2c..2c+1, column r of it. */
#pragma once
#include "types.cuh"

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1);

template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<fp16>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row_address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32 (&r)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row_address) : "memory");
}

/* The reverse of ldmatrix_x4 (sm_90). */
__device__ __forceinline__ void stmatrix_x4(uint32 row_address, const uint32 (&r)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
        :: "r"(row_address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#endif
}

/* Transposes an 8x8 matrix held as (r, 2c..2c+1): afterwards the lane holds (2c..2c+1, r). */
__device__ __forceinline__ uint32 transpose_8x8(uint32 pair) {
    uint32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

/* Two floats rounded to T, the first in the low half. */
template <typename T>
__device__ __forceinline__ uint32 pack(float low, float high);

template <>
__device__ __forceinline__ uint32 pack<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32*>(&pair);
}

template <>
__device__ __forceinline__ uint32 pack<fp16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32*>(&pair);
}
