"""Keys and values of all layers, in blocks, on the device and (for swapping) on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupy_engine.device import Array, Device
from cupy_engine.model_config import ModelConfig
from cupy_engine.ops.kv_cache import copy_blocks

BlockPairs = Sequence[tuple[int, int]]  # (from, to) block ids


def bytes_per_block(config: ModelConfig, block_size: int, dtype: Any) -> int:
    """Bytes of one block: K and V of ``block_size`` tokens over all layers."""
    return block_size * config.kv_bytes_per_token(np.dtype(dtype).itemsize)


def blocks_that_fit(config: ModelConfig, block_size: int, dtype: Any, budget_bytes: int) -> int:
    """How many blocks ``budget_bytes`` of memory hold."""
    return max(0, budget_bytes // bytes_per_block(config, block_size, dtype))


class KVCache:
    """Two pools of blocks under one numbering each; which block belongs to whom is the block manager's affair.

    Args:
        config: the model's hyper-parameters.
        num_blocks: blocks on the device.
        block_size: tokens per block.
        num_host_blocks: blocks on the host, for sequences that are swapped out.
        device: where the first pool lives.
        dtype: of keys and values.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, num_host_blocks: int, device: Device, dtype: Any
    ) -> None:
        def shape(blocks: int) -> tuple[int, ...]:
            return (config.num_layers, 2, blocks, block_size, config.num_kv_heads, config.head_dim)

        self._blocks = device.xp.zeros(shape(num_blocks), dtype)  # zeros: stale NaN must not leak past a mask
        self._host_blocks = device.host_zeros(shape(num_host_blocks), dtype)
        self._layers = [(kv[0], kv[1]) for kv in self._blocks]

    def layer(self, index: int) -> tuple[Array, Array]:
        """Keys and values of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[index]

    def copy_blocks(self, pairs: BlockPairs) -> None:
        """Copy device blocks (source, destination), in all layers."""
        copy_blocks(self._blocks, self._blocks, _pair_array(pairs))

    def swap_out(self, pairs: BlockPairs) -> None:
        """Copy blocks (device block, host block) to the host."""
        copy_blocks(self._blocks, self._host_blocks, _pair_array(pairs))

    def swap_in(self, pairs: BlockPairs) -> None:
        """Copy blocks (host block, device block) to the device."""
        copy_blocks(self._host_blocks, self._blocks, _pair_array(pairs))

    @property
    def num_bytes(self) -> int:
        """Bytes of the device pool."""
        return int(self._blocks.nbytes)


def _pair_array(pairs: BlockPairs) -> np.ndarray:
    return np.array(pairs, np.int32).reshape(-1, 2)
