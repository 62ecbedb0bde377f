"""Writing keys and values into cache blocks, and moving whole blocks.

A cache is [num_blocks, block_size, Hkv, D]; slot ``s`` is row ``s % block_size`` of block ``s // block_size``.
"""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _cuda_kv_cache


def write_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
    """Store each token's key and value at its slot.

    Args:
        k, v: [T, Hkv, D].
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], written in place.
        slot_mapping: [T] int32; a negative slot marks a padding row that is not stored.
    """
    if not isinstance(k, np.ndarray):
        _cuda_kv_cache.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    if slot_mapping.size and slot_mapping.min() < 0:
        is_token = slot_mapping >= 0
        k, v, slot_mapping = k[is_token], v[is_token], slot_mapping[is_token]
    row_shape = k_cache.shape[2:]
    k_cache.reshape(-1, *row_shape)[slot_mapping] = k
    v_cache.reshape(-1, *row_shape)[slot_mapping] = v


def copy_blocks(source: Array, destination: Array, pairs: Array) -> None:
    """Copy whole blocks: ``destination[:, :, pairs[i, 1]] = source[:, :, pairs[i, 0]]`` for all i.

    The same array may be both, as long as no block is copied from after it was copied to. One of the two may live on
    the host (swapping).

    Args:
        source, destination: [num_layers, 2, num_blocks, block_size, Hkv, D] of any number of blocks.
        pairs: [n, 2] int32 block ids (from, to) on the host.
    """
    if not (isinstance(source, np.ndarray) and isinstance(destination, np.ndarray)):
        _cuda_kv_cache.copy_blocks(source, destination, pairs)
        return
    destination[:, :, pairs[:, 1]] = source[:, :, pairs[:, 0]]
