/* Activation functions of one float32. */
#pragma once

struct Silu {
    static __device__ __forceinline__ float apply(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
};

struct QuickGelu {
    static __device__ __forceinline__ float apply(float x) { return __fdividef(x, 1.0f + __expf(-1.702f * x)); }
};

struct Gelu {
    static __device__ __forceinline__ float apply(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};

struct GeluTanh {
    static __device__ __forceinline__ float apply(float x) {
        // x/2 * (1 + tanh(u)) = x / (1 + exp(-2u))
        const float u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
        return __fdividef(x, 1.0f + __expf(-2.0f * u));
    }
};

struct Relu {
    static __device__ __forceinline__ float apply(float x) { return fmaxf(x, 0.0f); }
};

struct SquaredRelu {
    static __device__ __forceinline__ float apply(float x) { return fmaxf(x, 0.0f) * fmaxf(x, 0.0f); }
};
