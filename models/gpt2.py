"""GPT-2 (Radford et al. 2019): LayerNorm before each block, learned positions, multi-head attention, GELU.

stream  = wte(tokens) + wpe(positions)
stream += c_proj(attention(c_attn(ln_1(stream))))  } num_layers
stream += c_proj(gelu(c_fc(ln_2(stream))))         } times
logits  = wte^T(ln_f(stream))
"""

from __future__ import annotations

from typing import Any

from cupy_engine.batch import Batch
from cupy_engine.device import Array, Device
from cupy_engine.kv_cache import KVCache
from cupy_engine.layers import Attention, Embedding, LayerNorm, Linear, LMHead, ResidualStream
from cupy_engine.loader import Loader
from cupy_engine.model_config import ModelConfig
from cupy_engine.ops.activation import activation
from cupy_engine.weights import WeightSource

_CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class Conv1DSource:
    """A GPT-2 checkpoint as linear layers know it: its projections are stored as Conv1D, [in, out]."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor ``name``, projections turned to [out, in]."""
        if name.endswith(_CONV1D_WEIGHTS):
            return self._source.take(name, shape[::-1]).T
        return self._source.take(name, shape)


class GPT2Attention:
    """``c_proj(attention(c_attn(x)))``."""

    def __init__(self, config: ModelConfig, loader: Loader, layer: int) -> None:
        hidden = config.hidden_size
        self.c_attn = Linear(loader, "c_attn", 3 * hidden, hidden, bias=True)
        self.attention = Attention(config, layer, scale=_attention_scale(config, layer))
        self.c_proj = Linear(loader, "c_proj", hidden, hidden, bias=True)

    def __call__(self, x: Array, batch: Batch, kv_cache: KVCache) -> Array:
        return self.c_proj(self.attention(self.c_attn(x), batch, kv_cache))


class GPT2MLP:
    """``c_proj(gelu(c_fc(x)))``."""

    def __init__(self, config: ModelConfig, loader: Loader) -> None:
        self.c_fc = Linear(loader, "c_fc", config.intermediate_size, config.hidden_size, bias=True)
        self.activation = activation(config.activation)
        self.c_proj = Linear(loader, "c_proj", config.hidden_size, config.intermediate_size, bias=True)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(self.activation(self.c_fc(x)))


class GPT2Layer:
    """One transformer block."""

    def __init__(self, config: ModelConfig, loader: Loader, layer: int) -> None:
        self.ln_1 = LayerNorm(loader, "ln_1", config.hidden_size, config.norm_eps)
        self.attention = GPT2Attention(config, loader.at("attn"), layer)
        self.ln_2 = LayerNorm(loader, "ln_2", config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config, loader.at("mlp"))
        self.is_last = layer == config.num_layers - 1

    def __call__(self, stream: ResidualStream, batch: Batch, kv_cache: KVCache) -> None:
        stream.add(self.attention(stream.normed(self.ln_1), batch, kv_cache))
        if self.is_last:
            stream.keep(batch.output_rows)
        stream.add(self.mlp(stream.normed(self.ln_2)))


class GPT2LMHeadModel:
    """The decoder and its output head. Raises ModelLoadError where a tensor is missing or has the wrong shape."""

    def __init__(self, config: ModelConfig, weights: WeightSource, device: Device, dtype: Any) -> None:
        loader = Loader(Conv1DSource(weights), device, dtype)
        body = loader.at("transformer")
        self.wte = Embedding(body, "wte", config.vocab_size, config.hidden_size)
        self.wpe = Embedding(body, "wpe", config.max_position_embeddings, config.hidden_size)
        self.layers = [GPT2Layer(config, body.at(f"h.{i}"), i) for i in range(config.num_layers)]
        self.ln_f = LayerNorm(body, "ln_f", config.hidden_size, config.norm_eps)
        self.lm_head = LMHead(loader, "lm_head", config, self.wte if config.tie_word_embeddings else None)
        self.weights = loader.loaded

    def forward(self, batch: Batch, kv_cache: KVCache) -> Array:
        """Hidden states [R, H] after the last norm; stores all tokens' keys and values in the cache."""
        stream = ResidualStream(self.wte(batch.token_ids))
        stream.add(self.wpe(batch.positions))
        for layer in self.layers:
            layer(stream, batch, kv_cache)
        return stream.normed(self.ln_f)

    def compute_logits(self, hidden: Array) -> Array:
        """[R, H] → [R, V] float32."""
        return self.lm_head(hidden)


def _attention_scale(config: ModelConfig, layer: int) -> float:
    scale = config.head_dim**-0.5 if config.raw.get("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.raw.get("scale_attn_by_inverse_layer_idx", False) else scale
