"""Llama (arXiv:2302.13971): RMSNorm before each block, rotary positions, grouped queries, SwiGLU.

stream  = embed(tokens)
stream += o(attention(rope(qkv(norm(stream)))))           } num_layers
stream += down(silu(gate(norm(stream))) * up(norm(stream))) } times
logits  = lm_head(norm(stream))
"""

from __future__ import annotations

from typing import Any

from cupy_engine.batch import Batch
from cupy_engine.device import Array, Device
from cupy_engine.kv_cache import KVCache
from cupy_engine.layers import Attention, Embedding, GatedLinear, Linear, LMHead, ResidualStream, RMSNorm, qkv_linear
from cupy_engine.loader import Loader
from cupy_engine.model_config import ModelConfig, RopeConfig
from cupy_engine.ops.rope import rope_table
from cupy_engine.weights import WeightSource


class LlamaAttention:
    """``o(attention(rope(q), rope(k), v))``."""

    def __init__(self, config: ModelConfig, loader: Loader, layer: int, rope: Array) -> None:
        query_size = config.num_heads * config.head_dim
        self.qkv = qkv_linear(loader, config)
        self.attention = Attention(config, layer, rope, config.sliding_window)
        self.o = Linear(loader, "o_proj", config.hidden_size, query_size, config.attention_bias)

    def __call__(self, x: Array, batch: Batch, kv_cache: KVCache) -> Array:
        return self.o(self.attention(self.qkv(x), batch, kv_cache))


class LlamaMLP:
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, loader: Loader) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = GatedLinear(loader, config.activation, inner, hidden, bias)
        self.down = Linear(loader, "down_proj", hidden, inner, bias)

    def __call__(self, x: Array) -> Array:
        return self.down(self.gated(x))


class LlamaLayer:
    """One transformer block."""

    def __init__(self, config: ModelConfig, loader: Loader, layer: int, rope: Array) -> None:
        self.attention_norm = RMSNorm(loader, "input_layernorm", config.hidden_size, config.norm_eps)
        self.attention = LlamaAttention(config, loader.at("self_attn"), layer, rope)
        self.mlp_norm = RMSNorm(loader, "post_attention_layernorm", config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config, loader.at("mlp"))
        self.is_last = layer == config.num_layers - 1

    def __call__(self, stream: ResidualStream, batch: Batch, kv_cache: KVCache) -> None:
        stream.add(self.attention(stream.normed(self.attention_norm), batch, kv_cache))
        if self.is_last:
            stream.keep(batch.output_rows)
        stream.add(self.mlp(stream.normed(self.mlp_norm)))


class LlamaForCausalLM:
    """The decoder and its output head. Raises ModelLoadError where a tensor is missing or has the wrong shape."""

    def __init__(self, config: ModelConfig, weights: WeightSource, device: Device, dtype: Any) -> None:
        loader = Loader(weights, device, dtype)
        body = loader.at("model")
        rope = device.asarray(rope_table(config.rope or RopeConfig(), config.head_dim, config.max_position_embeddings))
        self.embed = Embedding(body, "embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = [LlamaLayer(config, body.at(f"layers.{i}"), i, rope) for i in range(config.num_layers)]
        self.norm = RMSNorm(body, "norm", config.hidden_size, config.norm_eps)
        self.lm_head = LMHead(loader, "lm_head", config, self.embed if config.tie_word_embeddings else None)
        self.weights = loader.loaded

    def forward(self, batch: Batch, kv_cache: KVCache) -> Array:
        """Hidden states [R, H] after the last norm; stores all tokens' keys and values in the cache."""
        stream = ResidualStream(self.embed(batch.token_ids))
        for layer in self.layers:
            layer(stream, batch, kv_cache)
        return stream.normed(self.norm)

    def compute_logits(self, hidden: Array) -> Array:
        """[R, H] → [R, V] float32."""
        return self.lm_head(hidden)
