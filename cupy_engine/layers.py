"""The layers that models are written with: weights, and the op that uses them. T tokens, H hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cupy_engine.batch import Batch
from cupy_engine.device import Array
from cupy_engine.kv_cache import KVCache
from cupy_engine.loader import DenseProduct, Loader
from cupy_engine.model_config import ModelConfig
from cupy_engine.ops.activation import gated_activation
from cupy_engine.ops.attention import paged_attention
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.linear import linear
from cupy_engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from cupy_engine.ops.rope import rope_and_write_kv


class ResidualStream:
    """The running sum of embeddings and block outputs; each addition waits to be fused with the norm that follows it.

    Usage::

        stream = ResidualStream(embedded)
        stream.add(attention(stream.normed(attention_norm)))
    """

    def __init__(self, hidden: Array) -> None:
        self._sum = hidden  # [T, H], updated in place
        self._pending: Array | None = None  # [T, H]

    def add(self, output: Array) -> None:
        """Add a block's output [T, H]."""
        self._pending = output

    def keep(self, rows: Array | None) -> None:
        """Go on with these rows [R] alone, or with all.

        Once the last layer has stored its keys and values, the rest is for the tokens whose states are asked for: of a
        prompt that is the last one, or none.
        """
        if rows is None:
            return
        self._sum = embedding(rows, self._sum)
        if self._pending is not None:
            self._pending = embedding(rows, self._pending)

    def normed(self, norm: Norm) -> Array:
        """The normalized sum [T, H]."""
        pending, self._pending = self._pending, None
        return norm(self._sum, pending)


class Linear:
    """``x W^T + b``, or several such layers of one input stacked into one product.

    Args:
        loader: at the module that holds the named layers.
        names: a layer's name, or several whose outputs lie side by side.
        out_features: N of each.
        in_features: K.
        bias: whether they have biases.
    """

    def __init__(
        self,
        loader: Loader,
        names: str | Sequence[str],
        out_features: int | Sequence[int],
        in_features: int,
        bias: bool = False,
    ) -> None:
        names = [names] if isinstance(names, str) else names
        out_features = [out_features] if isinstance(out_features, int) else out_features
        self._weight = loader.scheme.load(loader, names, out_features, in_features, bias)

    def __call__(self, x: Array) -> Array:
        """[T, K] → [T, N]."""
        return self._weight.apply(x)


class GatedLinear:
    """``act(gate(x)) * up(x)``, in one product.

    Args:
        loader: at the module that holds the layers ``gate_proj`` and ``up_proj``.
        activation: by the name that configurations give it.
        out_features: I of each.
        in_features: K.
        bias: whether they have biases.

    Raises:
        ConfigError: no such activation.
    """

    def __init__(self, loader: Loader, activation: str, out_features: int, in_features: int, bias: bool) -> None:
        names, sizes = ("gate_proj", "up_proj"), (out_features, out_features)
        self._weight = loader.scheme.load(loader, names, sizes, in_features, bias, gated_activation(activation))

    def __call__(self, x: Array) -> Array:
        """[T, K] → [T, I]."""
        return self._weight.apply(x)


class Embedding:
    """A table [V, H] of one row per id."""

    def __init__(self, loader: Loader, name: str, num_embeddings: int, hidden_size: int) -> None:
        self.table = loader.tensor(f"{name}.weight", (num_embeddings, hidden_size))

    def __call__(self, ids: Array) -> Array:
        """[T] → [T, H]."""
        return embedding(ids, self.table)


class LMHead:
    """Hidden states to logits; tied models reuse the embedding's table."""

    def __init__(self, loader: Loader, name: str, config: ModelConfig, tied: Embedding | None) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._table = tied.table if tied else loader.tensor(f"{name}.weight", shape)
        loader.loaded.products.append(DenseProduct(self._table, False, np.float32))

    def __call__(self, hidden: Array) -> Array:
        """[R, H] → [R, V] float32."""
        return linear(hidden, self._table, out_dtype=np.float32)


class Norm(Protocol):
    """A normalization layer."""

    def __call__(self, x: Array, addend: Array | None = None) -> Array:
        """[T, H] → [T, H]; an ``addend`` [T, H] is added to ``x`` in place first."""


class RMSNorm:
    """RMSNorm with a learned scale."""

    def __init__(self, loader: Loader, name: str, hidden_size: int, eps: float) -> None:
        self._weight = loader.tensor(f"{name}.weight", (hidden_size,))
        self._eps = eps

    def __call__(self, x: Array, addend: Array | None = None) -> Array:
        """[T, H] → [T, H]; an ``addend`` [T, H] is added to ``x`` in place first."""
        if addend is None:
            return rms_norm(x, self._weight, self._eps)
        return add_rms_norm(addend, x, self._weight, self._eps)


class LayerNorm:
    """LayerNorm with a learned scale and shift."""

    def __init__(self, loader: Loader, name: str, hidden_size: int, eps: float) -> None:
        self._weight = loader.tensor(f"{name}.weight", (hidden_size,))
        self._bias = loader.tensor(f"{name}.bias", (hidden_size,))
        self._eps = eps

    def __call__(self, x: Array, addend: Array | None = None) -> Array:
        """[T, H] → [T, H]; an ``addend`` [T, H] is added to ``x`` in place first."""
        if addend is None:
            return layer_norm(x, self._weight, self._bias, self._eps)
        return add_layer_norm(addend, x, self._weight, self._bias, self._eps)


class Attention:
    """Paged attention of one layer: rotates, stores keys and values, attends.

    Args:
        config: heads and their size.
        layer: index into the KV cache.
        rope_table: [P, 2, R/2] on the device, shared by all layers; ``None`` without rotary embedding.
        sliding_window: tokens a query sees, itself included; ``None`` for all.
        scale: factor on the scores; ``None`` for ``head_dim ** -0.5``.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        rope_table: Array | None = None,
        sliding_window: int | None = None,
        scale: float | None = None,
    ) -> None:
        self._layer = layer
        self._rope_table = rope_table
        self._sliding_window = sliding_window
        self._scale = config.head_dim**-0.5 if scale is None else scale

    def __call__(self, qkv: Array, batch: Batch, kv_cache: KVCache) -> Array:
        """[T, (Hq + 2 Hkv) * D], overwritten → [T, Hq * D]."""
        k_cache, v_cache = kv_cache.layer(self._layer)
        slots = batch.attention.slot_mapping
        q = rope_and_write_kv(qkv, batch.positions, self._rope_table, k_cache, v_cache, slots)
        mixed = paged_attention(q, k_cache, v_cache, batch.attention, self._scale, sliding_window=self._sliding_window)
        return mixed.reshape(len(qkv), -1)


def qkv_linear(loader: Loader, config: ModelConfig, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> Linear:
    """The query, key and value projections as one product: all query heads, then key heads, then value heads."""
    kv_size = config.num_kv_heads * config.head_dim
    sizes = (config.num_heads * config.head_dim, kv_size, kv_size)
    return Linear(loader, names, sizes, config.hidden_size, config.attention_bias)
