"""How the KV pools are sized, and how long a request may get."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError
from cupy_engine.kv_cache import bytes_per_block
from cupy_engine.model_config import ModelConfig

logger = logging.getLogger("cupy_engine")

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the KV pools and the context length that follows from them.

    ``limit_bytes`` is the share of the device that the engine may take, 0 where there is none; ``workspace_bytes`` and
    ``graph_bytes`` are what it takes or may come to take of that beside weights and KV cache.
    """

    num_blocks: int
    num_host_blocks: int
    bytes_per_block: int
    max_model_len: int
    block_size: int
    workspace_bytes: int = 0
    graph_bytes: int = 0
    limit_bytes: int = 0

    @property
    def blocks_per_sequence(self) -> int:
        """Block table columns."""
        return -(-self.max_model_len // self.block_size)


def wanted_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The context length asked for.

    Raises:
        ConfigError: more than the model was made for.
    """
    wanted = config.max_model_len or model.max_position_embeddings
    if wanted > model.max_position_embeddings:
        raise ConfigError("max_model_len", f"{wanted} is more than the model's {model.max_position_embeddings}")
    return wanted


def check_weights_fit(num_bytes: int, room_bytes: int, name: str) -> None:
    """Refuse a model before it is loaded.

    Raises:
        ConfigError: its weights alone are more than the device has room for.
    """
    if num_bytes > room_bytes:
        raise ConfigError(
            "model",
            f"the weights take {num_bytes / _MIB:.0f} MiB, but {name} has room for {max(0, room_bytes) / _MIB:.0f} MiB",
        )


def check_host_room(config: EngineConfig, plan: MemoryPlan, free_bytes: int) -> None:
    """Refuse pools that host memory cannot hold. The default room for swapping may be more: most of it is never used.

    Raises:
        ConfigError: names the option, what it takes and what is free.
    """
    pools = {
        "kv_cache_memory_bytes" if config.num_kv_blocks is None else "num_kv_blocks": plan.num_blocks,
        "swap_space_bytes": plan.num_host_blocks if config.swap_space_bytes > EngineConfig.swap_space_bytes else 0,
    }
    for field, num_blocks in pools.items():
        if num_blocks * plan.bytes_per_block > free_bytes:
            raise ConfigError(
                field,
                f"{num_blocks} blocks take {num_blocks * plan.bytes_per_block / _MIB:.0f} MiB, but "
                f"{free_bytes / _MIB:.0f} MiB of memory are free: lower it",
            )


def plan_kv_memory(
    config: EngineConfig,
    model: ModelConfig,
    dtype: Any,
    budget_bytes: int,
    budget_field: str,
    *,
    is_limit: bool = False,
    beside: str = "",
) -> MemoryPlan:
    """Divide ``budget_bytes`` into KV blocks, unless the configuration says how many there are.

    Args:
        budget_field: the configuration field that the budget depends on, for error messages.
        is_limit: blocks that the configuration asks for must fit the budget, too.
        beside: what else takes memory, for error messages.

    Raises:
        ConfigError: it does not hold one request of ``max_model_len`` tokens; says what would fit.
    """
    wanted_len = wanted_model_len(config, model)
    block_bytes = bytes_per_block(model, config.block_size, dtype)
    most_useful = config.max_num_seqs * -(-wanted_len // config.block_size)
    num_blocks = config.num_kv_blocks or min(budget_bytes // block_bytes, most_useful)
    if num_blocks < 1:
        raise ConfigError(
            budget_field,
            f"{max(0, budget_bytes) / _MIB:.0f} MiB are left for the KV cache{beside}, but one block takes "
            f"{block_bytes / _MIB:.1f} MiB",
        )
    if is_limit and num_blocks * block_bytes > budget_bytes:
        left = max(0, budget_bytes)
        raise ConfigError(
            "num_kv_blocks",
            f"{num_blocks} blocks take {num_blocks * block_bytes / _MIB:.0f} MiB, but {left / _MIB:.0f} MiB are "
            f"left{beside}: lower it to at most {left // block_bytes} or raise {budget_field}",
        )
    num_tokens = num_blocks * config.block_size
    if num_tokens < wanted_len:
        if config.max_model_len is not None:
            need_mib = -(-wanted_len // config.block_size) * block_bytes / _MIB
            raise ConfigError(
                "max_model_len",
                f"{wanted_len} tokens need {need_mib:.0f} MiB of KV cache, but it holds {num_tokens} tokens "
                f"({num_blocks * block_bytes / _MIB:.0f} MiB): lower max_model_len or raise {budget_field}",
            )
        logger.info("max_model_len lowered from %d to the %d tokens that the KV cache holds", wanted_len, num_tokens)
    return MemoryPlan(
        num_blocks,
        config.swap_space_bytes // block_bytes,
        block_bytes,
        min(wanted_len, num_tokens),
        config.block_size,
    )
