"""The first half of a gated MLP on the GPU: ``out[m, i] = f(x[m] · weight[i]) * (x[m] · weight[inter + i])``.

Either one kernel does all of it (``gemm_gated_sm90.cu``, for few rows ``gemm_skinny_sm90.cu``), or a product of
:mod:`._gemm` leaves gates and ups in memory for an activation kernel. Which, is looked up in the table that
:mod:`._gemm_tuning` fills by timing; shapes that were never timed take two kernels. Everything here can be captured in
a CUDA graph once it has run outside.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _gemm, _gemm_table
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._cuda_activation import activate_and_mul
from cupy_engine.ops._instantiations import GATED_SM90_BLOCK, GATED_SM90_SHARED_BYTES, HALF_TYPES
from cupy_engine.ops._launch import (
    TYPE_NAMES,
    as_dtype,
    empty,
    is_hopper,
    launch_with_maps,
    num_multiprocessors,
    type_name,
)
from cupy_engine.ops._skinny_gemm import skinny_product, skinny_products
from cupy_engine.ops._tensor_map import PANEL_COLUMNS, tensor_map

FUSED, APART = "fused", "apart"
_FEWEST_ROWS = 64  # for which gemm_gated_sm90.cu is worth timing
_BLOCKS, _ROWS, _COLUMNS, _GROUP_ROWS = 2, 128, 128, 64  # as in the kernel
_VECTOR = 8  # elements of 16 bytes


def gated_matmul(x: Array, weight: Array, bias: Array | None, functor: str) -> Array:
    """Gates and ups in one product, activated and multiplied.

    Args:
        x: [m, k], rows contiguous and any distance apart.
        weight: [2 * inter, k], contiguous, the gates' rows first, in the dtype of ``x``.
        bias: [2 * inter] in that dtype.
        functor: the activation's name in ``kernels/common/activations.cuh``.

    Returns:
        [m, inter].
    """
    (m, k), n = x.shape, len(weight)
    out = empty((m, n // 2), x.dtype)
    if m:
        stride = k if m == 1 else x.strides[0] // x.itemsize
        is_aligned = (x.data.ptr | weight.data.ptr | out.data.ptr) % 16 == 0
        _product(m, n, k, stride, x.dtype, bias is not None, is_aligned, functor).run(x, weight, bias, out)
    return out


@functools.lru_cache(maxsize=4096)
def _product(
    m: int, n: int, k: int, stride: int, dtype: np.dtype[Any], has_bias: bool, is_aligned: bool, functor: str
) -> _gemm.Product:
    shape = Shape(m, n, k, stride, dtype.name, dtype.name, has_bias)
    known = _gemm_table.table().get(shape, functor) if is_aligned else None
    if known == FUSED and can_fuse(shape):
        return FusedProduct(functor)
    return skinny_product(known, shape, functor) or _ApartProduct(functor)


def forget_products() -> None:
    """Look every product up again: the table has changed."""
    _product.cache_clear()


def candidates(shape: Shape, functor: str) -> list[_gemm.Product]:
    """Ways that are worth timing: a single one needs none."""
    fused = [FusedProduct(functor)] if shape.m >= _FEWEST_ROWS and can_fuse(shape) else []
    return [_ApartProduct(functor), *fused, *skinny_products(shape, functor)]


def can_fuse(shape: Shape) -> bool:
    """Whether the one kernel computes it, for arrays aligned to 16 bytes."""
    has_vectors = all(length % _VECTOR == 0 for length in (shape.k, shape.stride, shape.n // 2))
    is_half = TYPE_NAMES.get(as_dtype(shape.dtype)) in HALF_TYPES
    return is_hopper() and is_half and has_vectors and not shape.has_bias


class FusedProduct:
    """All in one kernel for many rows."""

    name = FUSED

    def __init__(self, functor: str) -> None:
        self._functor = functor

    def run(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        (m, k), inter, type_ = x.shape, len(weight) // 2, type_name(x)
        row, stride = 2 * k, int(x.strides[0]) if m > 1 else 2 * k
        x_map = tensor_map(x.data.ptr, type_, (k, m), (stride,), (PANEL_COLUMNS, _ROWS))
        weight_box = (PANEL_COLUMNS, _COLUMNS // _BLOCKS, 2)
        weight_map = tensor_map(weight.data.ptr, type_, (k, inter, 2), (row, inter * row), weight_box)
        out_map = tensor_map(out.data.ptr, type_, (inter, m), (2 * inter,), (PANEL_COLUMNS, _GROUP_ROWS))
        num_tiles = -(-m // (_BLOCKS * _ROWS)) * -(-inter // _COLUMNS)
        grid = (_BLOCKS * min(num_tiles, num_multiprocessors() // _BLOCKS),)
        expression = f"gemm_gated_sm90<{type_}, {self._functor}>"
        maps = (x_map, weight_map, out_map)
        launch_with_maps(
            *("gemm_gated_sm90.cu", expression, grid, GATED_SM90_BLOCK, *maps, m, inter, k),
            shared_bytes=GATED_SM90_SHARED_BYTES,
        )


class _ApartProduct:
    """A product, then an activation kernel."""

    name = APART

    def __init__(self, functor: str) -> None:
        self._functor = functor

    def run(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        activate_and_mul(_gemm.matmul(x, weight, bias), self._functor, out)
