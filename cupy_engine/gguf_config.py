"""GGUF metadata as a ModelConfig."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from cupy_engine.config_fields import ConfigFields
from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_file import GGUFFile, GGUFTensor
from cupy_engine.model_config import ModelConfig, RopeConfig, RopeType

ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_ROPE_TYPES = {"none": "default", "linear": "linear", "yarn": "yarn"}
_MAX_RAW_ITEMS = 64
_CONTROL_TOKEN = 3
_END_OF_TURN = frozenset({"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>"})


def load_gguf_config(gguf: GGUFFile) -> ModelConfig:
    """Derive the configuration from a GGUF file of the llama (also Mistral) or gpt2 architecture.

    Raises:
        ModelLoadError: another architecture, or a field is missing or nonsensical; names file and field.
    """
    architecture = ConfigFields(gguf.metadata, gguf.path).text("general.architecture")
    if architecture not in ("llama", "gpt2"):
        raise ModelLoadError(
            f"architecture {architecture!r} is not supported in GGUF; llama and gpt2 are", file=gguf.path
        )
    fields = ConfigFields.under(f"{architecture}.", gguf.metadata, gguf.path)
    return _llama_config(gguf, fields) if architecture == "llama" else _gpt2_config(gguf, fields)


def _llama_config(gguf: GGUFFile, fields: ConfigFields) -> ModelConfig:
    if fields.integer("expert_count", default=0, minimum=0):
        raise fields.error("expert_count", "mixtures of experts are not supported in GGUF")
    num_heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", default=fields.integer("embedding_length") // num_heads)
    sliding_window = fields.integer("attention.sliding_window", default=None)
    return ModelConfig(
        architecture="MistralForCausalLM" if sliding_window else "LlamaForCausalLM",
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=head_dim,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        activation="silu",
        rope=_rope(gguf, fields, head_dim),
        sliding_window=sliding_window,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_up.bias" in gguf.tensors,
        **_common_fields(gguf, fields),
    )


def _gpt2_config(gguf: GGUFFile, fields: ConfigFields) -> ModelConfig:
    num_heads = fields.integer("attention.head_count")
    return ModelConfig(
        architecture="GPT2LMHeadModel",
        num_kv_heads=num_heads,
        head_dim=fields.integer("embedding_length") // num_heads,
        norm_eps=fields.number("attention.layer_norm_epsilon"),
        activation="gelu_new",
        attention_bias=True,
        mlp_bias=True,
        **_common_fields(gguf, fields),
    )


def _common_fields(gguf: GGUFFile, fields: ConfigFields) -> dict[str, Any]:
    num_heads, hidden_size = fields.integer("attention.head_count"), fields.integer("embedding_length")
    if hidden_size % num_heads:
        raise fields.error("attention.head_count", f"{num_heads} heads do not divide embedding_length {hidden_size}")
    embedding = _tensor(gguf, _EMBEDDING, num_dims=2)
    vocab_size = embedding.shape[0]
    tokenizer = ConfigFields.under("tokenizer.ggml.", gguf.metadata, gguf.path)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_layers": fields.integer("block_count"),
        "num_heads": num_heads,
        "max_position_embeddings": fields.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "dtype": _DTYPES.get(embedding.type_name, "float32"),
        "bos_token_id": tokenizer.token_id("bos_token_id", vocab_size),
        "eos_token_ids": _eos_token_ids(tokenizer, vocab_size),
        "pad_token_id": tokenizer.token_id("padding_token_id", vocab_size),
        "raw": _raw(gguf.metadata),
    }


def _num_kv_heads(fields: ConfigFields, num_heads: int) -> int:
    num_kv_heads: int = fields.integer("attention.head_count_kv", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("attention.head_count_kv", f"{num_kv_heads} does not divide the {num_heads} attention heads")
    return num_kv_heads


def _eos_token_ids(fields: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    """The ids that metadata names, then control tokens whose text says that a turn or text ends: GGUF has no list."""
    named = [
        token_id
        for role in ("eos", "eot", "eom")
        if (token_id := fields.token_id(f"{role}_token_id", vocab_size)) is not None
    ]
    tokens = fields.values.get("tokens")
    types = fields.values.get("token_type")
    if isinstance(tokens, list) and isinstance(types, np.ndarray) and len(tokens) == len(types):
        control_ids = np.flatnonzero(types[:vocab_size] == _CONTROL_TOKEN).tolist()
        named += [token_id for token_id in control_ids if tokens[token_id] in _END_OF_TURN]
    return tuple(dict.fromkeys(named))


def _rope(gguf: GGUFFile, fields: ConfigFields, head_dim: int) -> RopeConfig:
    theta = fields.number("rope.freq_base", default=10000.0)
    rotary_dim = fields.integer("rope.dimension_count", default=head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise fields.error("rope.dimension_count", f"{rotary_dim} does not fit heads of {head_dim} dimensions")
    if ROPE_FACTORS in gguf.tensors:
        scaling = _llama3_scaling(gguf, theta, rotary_dim)
        return RopeConfig(rope_type="llama3", theta=theta, rotary_dim=rotary_dim, scaling=scaling)
    rope_type = _ROPE_TYPES.get(fields.text("rope.scaling.type", default="none"))
    if rope_type is None:
        raise fields.error("rope.scaling.type", f"must be one of {', '.join(_ROPE_TYPES)}")
    scaling = {} if rope_type == "default" else {"factor": fields.number("rope.scaling.factor")}
    if rope_type == "yarn":
        max_positions = fields.integer("context_length")
        original = fields.integer("rope.scaling.original_context_length", default=max_positions)
        scaling["original_max_position_embeddings"] = original
    return RopeConfig(rope_type=cast(RopeType, rope_type), theta=theta, rotary_dim=rotary_dim, scaling=scaling)


def _llama3_scaling(gguf: GGUFFile, theta: float, rotary_dim: int) -> dict[str, Any]:
    """Recover Llama 3's scaling from the table of frequency divisors, the only trace of it that GGUF keeps.

    All published Llama 3.x models share everything but the factor, the divisor of the lowest frequency.
    """
    tensor = _tensor(gguf, ROPE_FACTORS, num_dims=1)
    if tensor.type_name != "F32" or tensor.shape != (rotary_dim // 2,):
        raise ModelLoadError(
            f"must be F32 ({rotary_dim // 2},), is {tensor.type_name} {tensor.shape}",
            file=gguf.path,
            tensor=ROPE_FACTORS,
        )
    divisors = np.fromfile(gguf.path, "<f4", tensor.shape[0], offset=tensor.offset)
    low, high, original, factor = 1.0, 4.0, 8192, float(divisors[-1])
    with np.errstate(all="ignore"):
        wavelengths = 2 * np.pi * theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
    if not (1 <= factor < np.inf) or not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelLoadError("holds frequency factors other than Llama 3's", file=gguf.path, tensor=ROPE_FACTORS)
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tensor(gguf: GGUFFile, name: str, num_dims: int) -> GGUFTensor:
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise ModelLoadError("is missing", file=gguf.path, tensor=name)
    if len(tensor.shape) != num_dims:
        raise ModelLoadError(f"must have {num_dims} dimensions, has shape {tensor.shape}", file=gguf.path, tensor=name)
    return tensor


def _raw(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as JSON has it, without vocabularies."""
    short = {
        key: value for key, value in metadata.items() if not hasattr(value, "__len__") or len(value) <= _MAX_RAW_ITEMS
    }
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in short.items()}
