"""A Hugging Face folder's ``config.json`` and ``generation_config.json`` as a ModelConfig.

Both spellings load: ``rope_parameters``/``dtype`` (transformers 5) and ``rope_theta``/``rope_scaling``/``torch_dtype``
(before), and GPT-2's ``n_embd``, ``n_head``, ``n_layer``, ``n_positions``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cupy_engine.config_fields import ConfigFields
from cupy_engine.json_file import read_json_object
from cupy_engine.model_config import ModelConfig, RopeConfig, RopeType
from cupy_engine.model_registry import check_architecture

_DTYPES = ("float32", "float16", "bfloat16")
_ROPE_SCALING_NUMBERS: dict[str, tuple[str, ...]] = {  # what a scaling type cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_STRETCHES_FROM_ORIGINAL = ("dynamic", "yarn")


def load_hf_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration; ``generation_config.json`` has the last word on end-of-sequence ids.

    Raises:
        ModelLoadError: a file is missing or not JSON, or a field is missing or nonsensical; names file and field.
    """
    file = folder / "config.json"
    config = _model_config(ConfigFields(read_json_object(file), file))
    generation_file = folder / "generation_config.json"
    if not generation_file.is_file():
        return config
    generation = ConfigFields(read_json_object(generation_file), generation_file)
    return replace(
        config, eos_token_ids=generation.token_ids("eos_token_id", config.vocab_size) or config.eos_token_ids
    )


def _model_config(fields: ConfigFields) -> ModelConfig:
    architecture = _architecture(fields)  # first: another one has other fields
    has_learned_positions = fields.has("n_positions")
    hidden_size = fields.integer("hidden_size", "n_embd")
    num_heads = fields.integer("num_attention_heads", "n_head")
    vocab_size = fields.integer("vocab_size")
    max_positions = fields.integer("max_position_embeddings", "n_positions")
    head_dim = _head_dim(fields, hidden_size, num_heads)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", "n_inner", default=4 * hidden_size),
        num_layers=fields.integer("num_hidden_layers", "n_layer"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        norm_eps=fields.number("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
        activation=fields.text("hidden_act", "hidden_activation", "activation_function"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=has_learned_positions),
        dtype=_dtype(fields),
        rope=None if has_learned_positions else _rope(fields, head_dim, max_positions),
        sliding_window=_sliding_window(fields),
        attention_bias=fields.flag("attention_bias", default=has_learned_positions),
        mlp_bias=fields.flag("mlp_bias", default=has_learned_positions),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        pad_token_id=fields.token_id("pad_token_id", vocab_size),
        raw=dict(fields.values),
    )


def _architecture(fields: ConfigFields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list with the model's class name, got {names!r}")
    check_architecture(names[0], fields.file)
    return names[0]


def _head_dim(fields: ConfigFields, hidden_size: int, num_heads: int) -> int:
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("head_dim", f"is missing and hidden_size {hidden_size} is no multiple of {num_heads} heads")
    head_dim: int = fields.integer("head_dim", default=hidden_size // num_heads)
    return head_dim


def _num_kv_heads(fields: ConfigFields, num_heads: int) -> int:
    num_kv_heads: int = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide the {num_heads} attention heads")
    return num_kv_heads


def _dtype(fields: ConfigFields) -> str:
    dtype: str = fields.text("dtype", "torch_dtype", default="float32")
    if dtype not in _DTYPES:
        raise fields.error("dtype", f"must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype


def _sliding_window(fields: ConfigFields) -> int | None:
    if not fields.flag("use_sliding_window", default=True):
        return None
    window: int | None = fields.integer("sliding_window", default=None)
    return window


def _rope(fields: ConfigFields, head_dim: int, max_positions: int) -> RopeConfig:
    name = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = ConfigFields(fields.mapping(name, default={}), fields.file, f"{name}.")
    rope_type = rope.text("rope_type", "type", default="default")
    scaling = {key: value for key, value in rope.values.items() if key not in ("rope_type", "type", "rope_theta")}
    _check_rope_scaling(rope, rope_type, scaling, max_positions)
    theta_from = rope if rope.has("rope_theta") else fields
    partial_from = rope if rope.has("partial_rotary_factor") else fields
    rotary_dim = int(head_dim * partial_from.number("partial_rotary_factor", default=1.0))
    if rotary_dim > head_dim or rotary_dim % 2 or not rotary_dim:
        raise partial_from.error("partial_rotary_factor", f"gives {rotary_dim} of {head_dim} dimensions")
    return RopeConfig(
        rope_type=cast(RopeType, rope_type),
        theta=theta_from.number("rope_theta", default=10000.0),
        rotary_dim=rotary_dim,
        scaling=scaling,
    )


def _check_rope_scaling(rope: ConfigFields, rope_type: str, scaling: dict[str, Any], max_positions: int) -> None:
    if rope_type not in _ROPE_SCALING_NUMBERS:
        raise rope.error("rope_type", f"must be one of {', '.join(_ROPE_SCALING_NUMBERS)}, got {rope_type!r}")
    for name in _ROPE_SCALING_NUMBERS[rope_type]:
        rope.number(name)
    if rope_type in _STRETCHES_FROM_ORIGINAL:
        original = rope.integer("original_max_position_embeddings", default=max_positions)
        scaling["original_max_position_embeddings"] = original
