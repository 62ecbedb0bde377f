"""``weight @ x`` in NumPy: the product of decoding one sequence, bound by reading the weight.

BLAS splits it over threads that wait for each other by spinning: the fastest way as long as no other process wants
their CPUs, and ten times slower than one thread when one does. So its speed is watched, and for a while after a slow
product the crew's threads share the work instead, which do not spin.
"""

from __future__ import annotations

import time

import numpy as np

from cupy_engine.ops._crew import crew

_MAX_LONE_SIZE = 400_000  # elements of a weight that OpenBLAS reads in the calling thread
_ROW_STEP = 16  # parts of whole kernel steps give the same sums as the whole
_SLOW_BYTES_PER_S = 2e9  # a machine's memory is several times as fast
_PRODUCTS_TO_AVOID = 256  # about two steps of a small model


class VectorProduct:
    """``weight @ x`` for float32 [N, K] and [K]; remembers whether BLAS was slow."""

    def __init__(self) -> None:
        self._num_to_avoid = 0

    def __call__(self, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        if weight.size <= _MAX_LONE_SIZE:
            return np.asarray(np.dot(weight, x))
        if self._num_to_avoid:
            self._num_to_avoid -= 1
            return _in_parts(weight, x)
        start_s = time.perf_counter()
        product = np.asarray(np.dot(weight, x))
        if time.perf_counter() - start_s > weight.nbytes / _SLOW_BYTES_PER_S:
            self._num_to_avoid = _PRODUCTS_TO_AVOID
        return product


def _in_parts(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    num_outputs, num_features = weight.shape
    step = max(1, _MAX_LONE_SIZE // (num_features * _ROW_STEP)) * _ROW_STEP
    out = np.empty(num_outputs, np.float32)

    def multiply(start: int) -> None:
        np.dot(weight[start : start + step], x, out=out[start : start + step])

    crew().run(multiply, [(start,) for start in range(0, num_outputs, step)])
    return out


vector_product = VectorProduct()
