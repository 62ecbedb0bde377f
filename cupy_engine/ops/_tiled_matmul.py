"""``x @ weight.T`` in NumPy, fast where it matters for serving: few rows, a large weight.

One row is a matrix-vector product, bound by memory, which BLAS does well; so it does hundreds of rows. In between it
spends much of its time packing the weight. Its AVX-512 kernels for small matrices need no packing, so the product is
cut into tiles small enough for them, which the crew's threads share:

    weight [N, K]                x.T [K, T]           out.T [N, T]
    slab 0  ───────────      block 0 │ block 1       ┌──────┬──────┐
    slab 1  ───────────              │               ├──────┼──────┤   one tile = slab @ block
    ...                              │               └──────┴──────┘

On a 2-core EPYC (Zen 4) the products of one SmolLM2 step at 16 rows take 31 ms in tiles and 44 ms in one piece.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cupy_engine.ops._crew import crew, even_cuts

_MAX_TILE_WORK = 1_000_000  # multiply-adds; above, OpenBLAS uses its packing kernels
_MAX_ROWS = 64  # of x; more are faster in one piece
_MAX_BLOCK = 32  # columns of x.T in a tile
_MIN_SLAB, _MAX_SLAB, _SLAB_STEP = 32, 192, 16  # rows of weight in a tile
_MIN_WEIGHT_SIZE = 1 << 18  # elements; below, handing over to another thread costs more than it saves


def matmul_few_rows(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``x @ weight.T`` for float32 [T, K] and [N, K]; the result may be laid out column by column."""
    num_rows, num_features = x.shape
    if num_rows == 1:
        product: np.ndarray = np.dot(weight, x[0])
        return product[None]
    widest_block = min(_MAX_BLOCK, _MAX_TILE_WORK // (_MIN_SLAB * num_features))
    is_tiled = 1 < num_rows <= _MAX_ROWS and weight.size >= _MIN_WEIGHT_SIZE and widest_block > 0 and has_avx512()
    if not is_tiled:
        product = np.matmul(weight, x.T)
        return product.T
    return _matmul_in_tiles(x, weight, widest_block)


def _matmul_in_tiles(x: np.ndarray, weight: np.ndarray, widest_block: int) -> np.ndarray:
    num_rows, num_features = x.shape
    cuts = even_cuts(num_rows, -(-num_rows // widest_block))
    slab = _slab_rows(len(weight), cuts[0].stop * num_features)
    num_slabs = len(weight) // slab
    tiled = num_slabs * slab

    blocks = [np.ascontiguousarray(x[cut].T) for cut in cuts]
    slabs = weight[:tiled].reshape(num_slabs, slab, num_features)
    out = np.empty((len(weight), num_rows), np.float32)
    out_slabs = out[:tiled].reshape(num_slabs, slab, num_rows)

    def multiply(share: slice) -> None:
        for cut, block in zip(cuts, blocks, strict=True):
            np.matmul(slabs[share], block, out=out_slabs[share, :, cut])

    crew().run(multiply, [(share,) for share in even_cuts(num_slabs, crew().num_threads)])
    if tiled < len(weight):
        np.matmul(weight[tiled:], x.T, out=out[tiled:])
    return out.T


def _slab_rows(num_outputs: int, block_work: int) -> int:
    # As few slabs as keep tiles small, but as many for one thread as for another.
    widest = min(_MAX_SLAB, _MAX_TILE_WORK // block_work // _SLAB_STEP * _SLAB_STEP)
    num_slabs = -(-num_outputs // (widest * crew().num_threads)) * crew().num_threads
    return -(-num_outputs // (num_slabs * _SLAB_STEP)) * _SLAB_STEP


@cache
def has_avx512() -> bool:
    """Whether this CPU has the instructions that OpenBLAS's kernels for small matrices are written for."""
    with open("/proc/cpuinfo") as lines:
        return any("avx512f" in line for line in lines if line.startswith("flags"))
