"""Timing the ways to compute a matrix product, so that each shape gets the fastest on this GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _gated_gemm, _gemm
from cupy_engine.ops._cublaslt import CublasLtError, Shape
from cupy_engine.ops._gemm_table import row_bucket, table
from cupy_engine.ops._launch import as_dtype, empty
from cupy_engine.ops.norm import rms_norm

_NUM_ROUNDS = 3
_NORM_WIDTH = 1024


def tune(weights: Sequence[Array], row_counts: Iterable[int], out_dtype: Any = None, has_bias: bool = False) -> None:
    """Time the candidates for products with ``weights`` and remember the best, unless it is known already.

    Args:
        weights: [n, k] each, of one shape; best those of all layers: if together they are larger than the GPU's cache,
            every product reads its weight from memory, as it will in a step.
        row_counts: the m to tune for; each stands for its row bucket: see :mod:`._gemm_table`.
        out_dtype: default that of the weights.
        has_bias: whether there will be a bias.
    """
    shapes = _shapes(weights[0], row_counts, out_dtype, has_bias)
    unknown = [shape for shape in shapes if table().get(shape) is None]
    for shape in unknown:
        table().set(shape, fastest(shape, weights).name)
    if unknown:
        table().save()
        _gemm.forget_products()


def tune_gated(weights: Sequence[Array], row_counts: Iterable[int], functor: str, has_bias: bool = False) -> None:
    """As :func:`tune`, for whether one kernel is faster than a product and an activation. To be called after that."""
    shapes = _shapes(weights[0], row_counts, None, has_bias)
    choices = {shape: _gated_gemm.candidates(shape, functor) for shape in shapes}
    unknown = [shape for shape in shapes if len(choices[shape]) > 1 and table().get(shape, functor) is None]
    for shape in unknown:
        stopwatch = _Stopwatch(shape, weights, shape.n // 2)
        table().set(shape, min(choices[shape], key=stopwatch.time_s).name, functor)
    if unknown:
        table().save()
        _gated_gemm.forget_products()


def fastest(shape: Shape, weights: Sequence[Array], products: Sequence[_gemm.Product] = ()) -> _gemm.Product:
    """The product with the shortest time over all ``weights``, among the given ones or all candidates."""
    return min(products or _gemm.candidates(shape), key=_Stopwatch(shape, weights, shape.n).time_s)


def _shapes(weight: Array, row_counts: Iterable[int], out_dtype: Any, has_bias: bool) -> list[Shape]:
    """One for each row bucket."""
    (n, k), dtype = weight.shape, weight.dtype.name
    out_name = dtype if out_dtype is None else np.dtype(out_dtype).name
    return [Shape(m, n, k, k, dtype, out_name, has_bias) for m in sorted({row_bucket(m) for m in row_counts})]


class _Stopwatch:
    """Times products of one shape: a captured graph of one launch per weight, the best of a few rounds.

    Each product is followed by a small norm, as in a step there is always something small before a product that needs
    its results: what counts is also whether a product's weights are on their way meanwhile.
    """

    def __init__(self, shape: Shape, weights: Sequence[Array], num_columns: int) -> None:
        import cupy

        rng = np.random.default_rng(0)
        self._weights = weights
        # Not zeros: the GPU clocks higher on them.
        self._x = cupy.asarray(rng.standard_normal((shape.m, shape.k), dtype=np.float32).astype(weights[0].dtype))
        self._out = empty((shape.m, num_columns), as_dtype(shape.out_dtype))
        self._bias = empty((shape.n,), self._out.dtype) if shape.has_bias else None
        self._hidden = cupy.asarray(np.ones((shape.m, _NORM_WIDTH)).astype(weights[0].dtype))
        current = cupy.cuda.get_current_stream()  # products keep scratch memory for every stream they have run on
        self._stream = current if current.ptr else cupy.cuda.Stream(non_blocking=True)

    def time_s(self, product: _gemm.Product) -> float:
        """Seconds for one round; infinite if the product fails."""
        import cupy

        with self._stream:
            try:
                self._run(product, self._weights[0])
            except CublasLtError:
                return float("inf")
            self._stream.begin_capture()
            for weight in self._weights:
                self._run(product, weight)
            graph = self._stream.end_capture()
            graph.launch(self._stream)
            marks = [cupy.cuda.Event() for _ in range(_NUM_ROUNDS + 1)]
            marks[0].record(self._stream)
            for mark in marks[1:]:
                graph.launch(self._stream)
                mark.record(self._stream)
            self._stream.synchronize()
        return min(float(cupy.cuda.get_elapsed_time(a, b)) for a, b in pairwise(marks)) / 1e3

    def _run(self, product: _gemm.Product, weight: Array) -> None:
        product.run(self._x, weight, self._bias, self._out)
        rms_norm(self._hidden, self._hidden[0], 1e-5, self._hidden)
