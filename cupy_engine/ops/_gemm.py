"""Dense matrix products on the GPU: ``out[m, n] = x[m, k] @ weight[n, k].T (+ bias)``.

cuBLASLt computes them, or for few rows the kernels ``gemv.cu`` and, on Hopper, ``gemm_skinny_sm90.cu``. Which one, and
with which algorithm, is looked up in a table that :mod:`cupy_engine.ops._gemm_tuning` fills by timing; shapes that were
never timed take the library's first suggestion. Everything here can be captured in a CUDA graph once it has run
outside.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _gemm_table
from cupy_engine.ops._cublaslt import Algorithm, Matmul, Shape
from cupy_engine.ops._instantiations import GEMV_ROWS_PER_WARP, GEMV_UNROLL, GEMV_WARPS, vector_widths
from cupy_engine.ops._launch import TYPE_NAMES, Launch, address, as_dtype, check_contiguous, empty
from cupy_engine.ops._skinny_gemm import skinny_product, skinny_products

_WORKSPACE_BYTES = 32 << 20
_ALIGNMENT = 16  # bytes; every fast algorithm is content with it
_GEMV = "gemv"  # stands in the table for gemv.cu, where others are an algorithm's bytes
_NUM_CANDIDATES = 8


def matmul(
    x: Array, weight: Array, bias: Array | None = None, out_dtype: Any = None, out: Array | None = None
) -> Array:
    """``x @ weight.T + bias``, accumulated in float32.

    Args:
        x: [m, k], rows contiguous and any distance apart.
        weight: [n, k], contiguous, in the dtype of ``x``; no kernel that is still queued may be writing it.
        bias: [n] in the dtype of ``out``.
        out_dtype: default that of ``x``; float32 keeps the accumulators.
        out: [m, n]; allocated if absent.

    Returns:
        [m, n], ``out``.

    Raises:
        ValueError: shapes or dtypes do not fit, or an array is not contiguous as said.
        CublasLtError: cuBLASLt has no algorithm for the shape.
    """
    (m, k), n = x.shape, len(weight)
    out = empty((m, n), x.dtype if out_dtype is None else np.dtype(out_dtype)) if out is None else out
    _check(x, weight, bias, out)
    if m:
        stride = k if m == 1 else x.strides[0] // x.itemsize
        dtypes = (x.dtype, out.dtype, bias is not None)
        _product(m, n, k, stride, *dtypes, _alignment(stride, x, weight, bias, out)).run(x, weight, bias, out)
    return out


class Product(Protocol):
    """A way to compute one shape. ``name`` finds it again in another process."""

    name: str

    def run(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        """Launch it on the current stream."""


@functools.lru_cache(maxsize=4096)
def _product(
    m: int, n: int, k: int, stride: int, dtype: np.dtype[Any], out_dtype: np.dtype[Any], has_bias: bool, alignment: int
) -> Product:
    return product(Shape(m, n, k, stride, dtype.name, out_dtype.name, has_bias), alignment)


def product(shape: Shape, alignment: int) -> Product:
    """The way to compute a shape, for arrays and rows aligned to ``alignment`` bytes."""
    known = _gemm_table.table().get(shape) if alignment == _ALIGNMENT else None
    if known == _GEMV and _gemv_computes(shape):
        return _GemvProduct(shape)
    if (skinny := skinny_product(known, shape)) is not None:
        return skinny
    descriptors = Matmul(shape)
    algorithm = Algorithm.from_hex(known) if known is not None else None
    if algorithm is not None and descriptors.accepts(algorithm, _WORKSPACE_BYTES):
        return _LtProduct(descriptors, algorithm)
    return _LtProduct(descriptors, descriptors.heuristics(1, _WORKSPACE_BYTES, alignment)[0])


def forget_products() -> None:
    """Look every product up again: the table has changed."""
    _product.cache_clear()


def candidates(shape: Shape) -> list[Product]:
    """Ways to compute a shape that are worth timing, for arrays and rows aligned to 16 bytes."""
    descriptors = Matmul(shape)
    algorithms = descriptors.heuristics(_NUM_CANDIDATES, _WORKSPACE_BYTES, _ALIGNMENT)
    products: list[Product] = [_LtProduct(descriptors, algorithm) for algorithm in algorithms]
    own_products = [_GemvProduct(shape)] if _gemv_computes(shape) else []
    return [*products, *own_products, *skinny_products(shape)]


class _LtProduct:
    """cuBLASLt with one of its algorithms."""

    def __init__(self, matmul: Matmul, algorithm: Algorithm) -> None:
        self.name = algorithm.to_hex()
        self._matmul = matmul
        self._algorithm = algorithm

    def run(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        stream, workspace = _stream_and_workspace()
        addresses = (address(x), address(weight), 0 if bias is None else address(bias), address(out))
        self._matmul.run(self._algorithm, *addresses, address(workspace), _WORKSPACE_BYTES, stream)


class _GemvProduct:
    """The kernel for a few rows: see ``kernels/gemv.cu``."""

    name = _GEMV

    def __init__(self, shape: Shape) -> None:
        rows_per_warp = GEMV_ROWS_PER_WARP[shape.m]
        grid = (-(-shape.n // (GEMV_WARPS * rows_per_warp)),)
        types = f"{_type(shape.dtype)}, {shape.m}, {rows_per_warp}, {GEMV_UNROLL}, {_type(shape.out_dtype)}"
        sizes = (shape.n, shape.k, np.int64(shape.stride))
        self._launch = Launch("gemv.cu", f"gemv<{types}>", grid, 32 * GEMV_WARPS, *sizes)

    def run(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        self._launch(out, x, weight, bias)


def _type(dtype: str) -> str:
    return TYPE_NAMES[as_dtype(dtype)]


def _gemv_computes(shape: Shape) -> bool:
    width = vector_widths(shape.dtype)[1]
    is_aligned = shape.k % width == 0 and shape.stride % width == 0
    has_kernel = shape.out_dtype == shape.dtype or (shape.out_dtype == "float32" and not shape.has_bias)
    return shape.m in GEMV_ROWS_PER_WARP and is_aligned and has_kernel


def _check(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    check_contiguous(weight=weight, out=out)
    (m, k), n = x.shape, len(weight)
    if weight.shape != (n, k) or (m and x.strides[1] != x.itemsize) or out.shape != (m, n):
        shapes = f"x {x.shape} with strides {x.strides}, weight {weight.shape}, out {out.shape}"
        raise ValueError(f"x [m, k] must have contiguous rows and fit weight [n, k] and out [m, n], got {shapes}")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != out.dtype):
        dtypes = ", ".join(str(array.dtype) for array in (x, weight, bias, out) if array is not None)
        raise ValueError(f"x and weight, bias and out must have equal dtypes, got {dtypes}")


def _alignment(stride: int, x: Array, weight: Array, bias: Array | None, out: Array) -> int:
    """The largest power of two up to 16 that divides all addresses and row lengths in bytes."""
    bits = _ALIGNMENT | stride * x.itemsize | weight.strides[0] | out.strides[0]
    bits |= x.data.ptr | weight.data.ptr | out.data.ptr | (0 if bias is None else bias.data.ptr)
    return int(bits & -bits)


_workspaces: dict[tuple[int, int], Array] = {}


def _stream_and_workspace() -> tuple[int, Array]:
    """The current stream's handle and its scratch memory: products on one stream follow one another."""
    import cupy

    stream = int(cupy.cuda.get_current_stream().ptr)
    key = (cupy.cuda.runtime.getDevice(), stream)
    if key not in _workspaces:
        _workspaces[key] = empty((_WORKSPACE_BYTES,), np.uint8)
    return stream, _workspaces[key]
