"""A model's hyper-parameters in one vocabulary, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched. ``scaling`` keeps the type's own parameters (factor, …)."""

    rope_type: RopeType = "default"
    theta: float = 10000.0
    rotary_dim: int = 0
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters of a decoder-only transformer.

    ``architecture`` is the Hugging Face class name (``LlamaForCausalLM``), the key of the model registry.
    ``raw`` is the untouched ``config.json`` (or its equivalent from GGUF metadata) for what only one model knows.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    tie_word_embeddings: bool
    dtype: str = "float32"
    rope: RopeConfig | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes
