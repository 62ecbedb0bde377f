"""Products of few rows on Hopper, also gated ones, by the kernel ``gemm_skinny_sm90.cu``.

It reads weights before the kernels that make ``x`` have ended, which cuBLASLt's do not. There are as many ways to call
it as ways to share k among the blocks of a cluster: :mod:`._gemm_tuning` times them.
"""

from __future__ import annotations

from collections.abc import Iterator

from cupy_engine.device import Array
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._instantiations import (
    HALF_TYPES,
    SKINNY_SM90_BLOCK,
    SKINNY_SM90_TOKENS,
    skinny_sm90_expression,
    skinny_sm90_shared_bytes,
)
from cupy_engine.ops._launch import TYPE_NAMES, as_dtype, is_hopper, launch_with_maps, num_multiprocessors
from cupy_engine.ops._tensor_map import PANEL_COLUMNS, tensor_map

PLAIN = "Plain"  # the functor of a product without an activation
_NAME = "skinny"
_ROWS = 128  # of weight, of a tile
_GATES = 8  # rows of gates in shared memory before the ups that belong to them
_VECTOR = 8  # elements of 16 bytes
_MOST_PARTS = 8  # blocks of a cluster
_BLOCKS_PER_MULTIPROCESSOR = 2
_NUM_CANDIDATES = 2


class SkinnyProduct:
    """One way to compute a shape of few rows.

    Args:
        shape: one that :func:`can_be_skinny`; its n are all rows of the weight, gates and ups.
        parts: among how many blocks k is shared, a power of two up to 8 and up to the number of 64 columns in k.
        functor: the activation's name in ``kernels/common/activations.cuh`` for a gated product.
    """

    def __init__(self, shape: Shape, parts: int, functor: str = PLAIN) -> None:
        self.name = f"{_NAME}{parts}"
        self._type, out_type = _type(shape.dtype), _type(shape.out_dtype)
        self._parts = parts
        self._tokens = next(tokens for tokens in SKINNY_SM90_TOKENS if tokens >= shape.m)
        self._is_gated = functor != PLAIN
        self._num_columns = shape.n // 2 if self._is_gated else shape.n
        self._grid = (parts, _num_tiles(shape.n, functor))
        self._expression = skinny_sm90_expression(self._type, out_type, self._tokens, functor)

    def run(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        m, k = x.shape
        stride = int(x.strides[0]) if m > 1 else k * x.itemsize
        x_map = tensor_map(x.data.ptr, self._type, (k, m), (stride,), (PANEL_COLUMNS, self._tokens))
        launch_with_maps(
            *("gemm_skinny_sm90.cu", self._expression, self._grid, SKINNY_SM90_BLOCK),
            *(x_map, self._weight_map(weight), out, bias, m, self._num_columns, k),
            shared_bytes=skinny_sm90_shared_bytes(self._tokens),
            cluster=self._parts,
        )

    def _weight_map(self, weight: Array) -> bytes:
        """Boxes of ``_ROWS`` rows, in a gated product ``_GATES`` gates and their ups in turns."""
        (n, k), row = weight.shape, int(weight.strides[0])
        if not self._is_gated:
            return tensor_map(weight.data.ptr, self._type, (k, n), (row,), (PANEL_COLUMNS, _ROWS))
        sizes, distances = (k, _GATES, 2, n // 2 // _GATES), (row, n // 2 * row, _GATES * row)
        return tensor_map(
            weight.data.ptr, self._type, sizes, distances, (PANEL_COLUMNS, _GATES, 2, _ROWS // 2 // _GATES)
        )


def can_be_skinny(shape: Shape, functor: str = PLAIN) -> bool:
    """Whether the kernel computes it, for arrays aligned to 16 bytes."""
    columns = shape.n if functor == PLAIN else shape.n // 2
    has_vectors = all(length % _VECTOR == 0 for length in (shape.k, shape.stride, columns))
    has_types = TYPE_NAMES.get(as_dtype(shape.dtype)) in HALF_TYPES and shape.out_dtype in (shape.dtype, "float32")
    if functor != PLAIN:
        has_types = has_types and shape.out_dtype == shape.dtype and not shape.has_bias
    return is_hopper() and shape.m <= SKINNY_SM90_TOKENS[-1] and has_vectors and has_types


def skinny_products(shape: Shape, functor: str = PLAIN) -> Iterator[SkinnyProduct]:
    """Ways that are worth timing: those that fill the GPU best without blocks that wait for others to end."""
    if can_be_skinny(shape, functor):
        most_blocks = _BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors()
        parts = min(_MOST_PARTS, _largest_power(most_blocks // _num_tiles(shape.n, functor)))
        parts = min(parts, _largest_power(-(-shape.k // PANEL_COLUMNS)))
        for shift in range(min(_NUM_CANDIDATES, parts.bit_length())):
            yield SkinnyProduct(shape, parts >> shift, functor)


def skinny_product(name: str | None, shape: Shape, functor: str = PLAIN) -> SkinnyProduct | None:
    """The way of this name; ``None`` if it is another kernel's, or not for this shape."""
    ways = skinny_products(shape, functor) if name is not None and name.startswith(_NAME) else ()
    return next((way for way in ways if way.name == name), None)


def _num_tiles(n: int, functor: str) -> int:
    return -(-n // _ROWS) if functor == PLAIN else -(-(n // 2) // (_ROWS // 2))


def _largest_power(limit: int) -> int:
    """The largest power of two up to ``limit``, at least 1."""
    return 1 << max(0, limit.bit_length() - 1)


def _type(name: str) -> str:
    return TYPE_NAMES[as_dtype(name)]
