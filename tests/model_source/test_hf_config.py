"""config.json and generation_config.json to ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden_data import TINY_MODELS, tiny_model

from cupy_engine.errors import ModelLoadError
from cupy_engine.hf_config import load_hf_config
from cupy_engine.model_config import ModelConfig, RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def load(folder: Path, generation: Any = None, **changes: Any) -> ModelConfig:
    values = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_hf_config(folder)


def test_llama_of_transformers_5() -> None:
    config = load_hf_config(tiny_model("llama-rope-llama3"))
    raw = config.raw
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        norm_eps=1e-5,
        activation="silu",
        tie_word_embeddings=False,
        dtype="float32",
        rope=RopeConfig(
            rope_type="llama3",
            theta=10000.0,
            rotary_dim=16,
            scaling={
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            },
        ),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
        raw=raw,
    )
    assert raw["pretraining_tp"] == 1


def test_gpt2() -> None:
    config = load_hf_config(tiny_model("gpt2"))
    assert config == ModelConfig(
        architecture="GPT2LMHeadModel",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        norm_eps=1e-5,
        activation="gelu_new",
        tie_word_embeddings=True,
        rope=None,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        raw=config.raw,
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tiny_model_loads(name: str) -> None:
    assert load_hf_config(tiny_model(name)).num_layers == 3


def test_mistral_window_and_biases() -> None:
    assert load_hf_config(tiny_model("mistral-sliding-window")).sliding_window == 24
    biased = load_hf_config(tiny_model("llama-mqa-bias-tied"))
    assert (biased.attention_bias, biased.mlp_bias, biased.tie_word_embeddings, biased.num_kv_heads) == (
        True,
        True,
        True,
        1,
    )


def test_what_older_files_leave_out(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (4, 16, "float32")
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)
    assert config.rope == RopeConfig(rotary_dim=16)
    assert not config.tie_word_embeddings
    assert not config.attention_bias


def test_null_is_not_set(tmp_path: Path) -> None:
    config = load(tmp_path, head_dim=None, num_key_value_heads=None, sliding_window=None, rope_scaling=None)
    assert (config.head_dim, config.num_kv_heads, config.sliding_window) == (16, 4, None)


@pytest.mark.parametrize("spelling", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}])
def test_dtype_in_both_spellings(tmp_path: Path, spelling: dict[str, str]) -> None:
    assert load(tmp_path, **spelling).dtype == "bfloat16"


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_rope_in_all_spellings(tmp_path: Path, spelling: dict[str, Any]) -> None:
    rope = load(tmp_path, **spelling).rope
    assert rope == RopeConfig(rope_type="linear", theta=5e5, rotary_dim=16, scaling={"factor": 2.0})


@pytest.mark.parametrize(("rope_type", "expected"), [("yarn", 512), ("dynamic", 512), ("linear", None)])
def test_stretching_starts_from_the_context_length(tmp_path: Path, rope_type: str, expected: int | None) -> None:
    rope = load(tmp_path, rope_scaling={"rope_type": rope_type, "factor": 2.0}).rope
    assert rope is not None
    assert rope.scaling.get("original_max_position_embeddings") == expected


def test_part_of_a_head_rotates(tmp_path: Path) -> None:
    rope = load(tmp_path, partial_rotary_factor=0.25).rope
    assert rope is not None
    assert rope.rotary_dim == 4


def test_window_that_is_switched_off(tmp_path: Path) -> None:
    assert load(tmp_path, sliding_window=24, use_sliding_window=False).sliding_window is None
    assert load(tmp_path, sliding_window=24, use_sliding_window=True).sliding_window == 24


@pytest.mark.parametrize(("written", "ids"), [(2, (2,)), ([7, 9, 7], (7, 9)), (None, ())])
def test_eos_is_one_id_or_a_list(tmp_path: Path, written: Any, ids: tuple[int, ...]) -> None:
    assert load(tmp_path, eos_token_id=written).eos_token_ids == ids


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    assert load(tmp_path, eos_token_id=2, generation={"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert load(tmp_path, eos_token_id=2, generation={"temperature": 1.0}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": ...}, "hidden_size or n_embd"),
        ({"rms_norm_eps": ...}, "rms_norm_eps"),
        ({"hidden_act": ...}, "hidden_act"),
        ({"architectures": ...}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "256"}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"dtype": "int8"}, "dtype"),
        ({"eos_token_id": 256}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
    ],
)
def test_nonsense_names_file_and_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path, **changes)
    assert f"config.json: field {field}" in str(caught.value)
    assert caught.value.file == tmp_path / "config.json"


def test_an_architecture_that_nobody_runs_is_told_before_the_fields_it_has_not(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json: architecture 'MambaForCausalLM' is unknown; .*Llama"):
        load(tmp_path, architectures=["MambaForCausalLM"], hidden_size=...)


def test_nonsense_in_generation_config_names_that_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: field eos_token_id"):
        load(tmp_path, generation={"eos_token_id": 1000})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe", "[" * 100_000, '{"a": 1} x'])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_hf_config(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json: cannot be read: No such file"):
        load_hf_config(tmp_path)
