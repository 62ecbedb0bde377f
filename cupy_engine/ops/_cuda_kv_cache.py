"""CUDA launches of cache writes and block copies: see ``kernels/kv_cache.cu`` and ``kernels/rope.cu``."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops._launch import Launch, check_contiguous, launch, type_name, vector_width

_VEC_BYTES = 16
_PINNED = 1  # cudaMemoryTypeHost


def write_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
    """Store k and v [T, Hkv, D] at slot_mapping [T]; a token's heads are contiguous, tokens any distance apart.

    Raises:
        ValueError: ``k`` and ``v`` lie differently, or an array is not contiguous as said.
    """
    check_contiguous(k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    if k.strides != v.strides or k.strides[1:] != (head_dim * k.itemsize, k.itemsize):
        raise ValueError(f"k and v must have contiguous tokens and equal strides, got {k.strides} and {v.strides}")
    row, token_stride = num_kv_heads * head_dim, k.strides[0] // k.itemsize
    width = vector_width(row, k, v, k_cache, v_cache)
    width = width if token_stride % width == 0 else 1
    launch(
        "kv_cache.cu",
        f"write_kv<{type_name(k)}, {width}>",
        (num_tokens,),
        min(256, -(-row // width // 32) * 32),
        k_cache,
        v_cache,
        k,
        v,
        slot_mapping,
        row,
        np.int64(token_stride),
        np.int64(_num_slots(k_cache)),
    )


def rope_and_write_kv(
    qkv: Array, positions: Array, table: Array | None, k_cache: Array, v_cache: Array, slot_mapping: Array
) -> Array:
    """Rotate the queries of qkv [T, (Hq + 2 Hkv) D] in place and store rotated keys, and values, in the cache.

    Returns:
        [T, Hq, D], a view of ``qkv``.
    """
    check_contiguous(qkv=qkv, positions=positions, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    num_tokens, (num_kv_heads, head_dim) = len(qkv), k_cache.shape[2:]
    heads = qkv.reshape(num_tokens, -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if table is None:
        k, v = heads[:, num_heads : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        write_kv(k, v, k_cache, v_cache, slot_mapping)
        return heads[:, :num_heads]
    check_contiguous(table=table)
    if num_tokens:
        num_positions, _, half = table.shape
        width = vector_width(head_dim, qkv, k_cache, v_cache)
        width = width if half % width == 0 else 1
        sizes = (num_heads, num_kv_heads, head_dim, half, num_positions)
        launch = _rope_launch(type_name(qkv), width, num_tokens, sizes, _num_slots(k_cache))
        launch(qkv, k_cache, v_cache, table, positions, slot_mapping)
    return heads[:, :num_heads]


@functools.lru_cache(maxsize=1024)
def _rope_launch(type_: str, width: int, num_tokens: int, sizes: tuple[int, ...], num_slots: int) -> Launch:
    num_heads, num_kv_heads, _, half, _ = sizes
    block = min(256, -(-(num_heads + num_kv_heads) * half // width // 32) * 32)
    expression = f"rope_and_write_kv<{type_}, {width}>"
    return Launch("rope.cu", expression, (num_tokens,), block, *sizes, np.int64(num_slots))


def copy_blocks(source: Array, destination: Array, pairs: Array) -> None:
    """Copy blocks pairs[:, 0] of source [L, 2, num_blocks, ...] to blocks pairs[:, 1] of destination.

    One of the two may be a page-locked host array. ``pairs`` [n, 2] int32 is on the device or on the host.

    Raises:
        ValueError: shapes or dtypes do not fit, or a host array is not page-locked.
    """
    check_contiguous(source=source, destination=destination)
    if source.dtype != destination.dtype or source.shape[:2] + source.shape[3:] != (
        destination.shape[:2] + destination.shape[3:]
    ):
        raise ValueError(f"blocks differ: {source.shape} {source.dtype} and {destination.shape} {destination.dtype}")
    if len(pairs) == 0:
        return
    num_planes = source.shape[0] * source.shape[1]
    block_bytes = source[0, 0, 0].nbytes
    if block_bytes % _VEC_BYTES:
        raise ValueError(f"blocks must be a multiple of {_VEC_BYTES} bytes, got {block_bytes}")
    launch(
        "kv_cache.cu",
        "copy_blocks",
        (len(pairs), num_planes),
        256,
        _device_pointer(destination),
        _device_pointer(source),
        _on_device(pairs),
        block_bytes // _VEC_BYTES,
        source.shape[2],
        destination.shape[2],
    )


def _num_slots(cache: Array) -> int:
    return int(cache.shape[0] * cache.shape[1])


def _device_pointer(array: Array) -> Any:
    if not isinstance(array, np.ndarray):
        return array
    import cupy

    if cupy.cuda.runtime.pointerGetAttributes(array.ctypes.data).type != _PINNED:
        raise ValueError("a host array of KV blocks must be page-locked (cupyx.empty_pinned)")
    return np.uint64(array.ctypes.data)


def _on_device(pairs: Array) -> Array:
    import cupy

    return cupy.ascontiguousarray(cupy.asarray(pairs, dtype=np.int32))
