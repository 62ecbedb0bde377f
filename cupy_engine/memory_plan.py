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
    """Sizes of the KV pools and the context length that follows from them."""

    num_blocks: int
    num_host_blocks: int
    bytes_per_block: int
    max_model_len: int
    block_size: int

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


def plan_kv_memory(
    config: EngineConfig, model: ModelConfig, dtype: Any, budget_bytes: int, budget_field: str
) -> MemoryPlan:
    """Divide ``budget_bytes`` into KV blocks, unless the configuration says how many there are.

    Args:
        budget_field: the configuration field that the budget depends on, for error messages.

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
            f"{max(0, budget_bytes) / _MIB:.0f} MiB are left for the KV cache, but one block takes "
            f"{block_bytes / _MIB:.1f} MiB",
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
