"""GGUF metadata to ModelConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_builder import write_tiny_gpt2, write_tiny_llama
from golden_data import tiny_model

from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_config import load_gguf_config
from cupy_engine.gguf_file import read_gguf
from cupy_engine.hf_config import load_hf_config
from cupy_engine.model_config import ModelConfig, RopeConfig
from cupy_engine.model_source import ModelFiles, load_model_config


def llama(folder: Path, name: str = "llama", **metadata: Any) -> ModelConfig:
    return load_gguf_config(read_gguf(write_tiny_llama(folder / "model.gguf", name, **metadata)))


def comparable(config: ModelConfig) -> dict[str, Any]:
    """All but what GGUF says in float32 or not at all."""
    return {key: value for key, value in vars(config).items() if key not in ("norm_eps", "raw", "pad_token_id")}


@pytest.mark.parametrize("name", ["llama", "llama-mqa-bias-tied"])
def test_llama_is_what_its_config_json_says(tmp_path: Path, name: str) -> None:
    config = llama(tmp_path, name, tokenizer__ggml__bos_token_id=1, tokenizer__ggml__eos_token_id=2)
    expected = load_hf_config(tiny_model(name))
    assert comparable(config) == comparable(expected)
    assert config.norm_eps == pytest.approx(expected.norm_eps)


def test_gpt2_is_what_its_config_json_says(tmp_path: Path) -> None:
    metadata = {"tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2}
    config = load_gguf_config(read_gguf(write_tiny_gpt2(tmp_path / "model.gguf", **metadata)))
    assert comparable(config) == comparable(load_hf_config(tiny_model("gpt2")))


def test_the_default_model(default_model: ModelFiles) -> None:
    config = load_model_config(default_model)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert config.rope == RopeConfig(theta=100000.0, rotary_dim=64)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 0))
    assert config.tie_word_embeddings
    assert "tokenizer.ggml.tokens" not in config.raw
    assert config.raw["llama.context_length"] == config.max_position_embeddings == 8192


def test_a_window_makes_it_a_mistral(tmp_path: Path) -> None:
    config = llama(tmp_path, llama__attention__sliding_window=24)
    assert (config.architecture, config.sliding_window) == ("MistralForCausalLM", 24)


def test_linear_and_yarn_rope(tmp_path: Path) -> None:
    linear = llama(tmp_path, llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert linear.rope == RopeConfig(rope_type="linear", rotary_dim=16, scaling={"factor": 4.0})
    metadata = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    yarn = llama(tmp_path, **{f"llama__rope__scaling__{key}": value for key, value in metadata.items()})
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    assert yarn.rope == RopeConfig(rope_type="yarn", rotary_dim=16, scaling=scaling)


def llama3_divisors(theta: float, rotary_dim: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency at a time."""
    divisors = []
    for i in range(0, rotary_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / rotary_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def write_with_divisors(path: Path, divisors: np.ndarray) -> ModelConfig:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(131072)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tensor("token_embd.weight", np.zeros((4, 128), np.float32))
    writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_gguf_config(read_gguf(path))


def test_llama3_scaling_is_recovered_from_its_table(tmp_path: Path) -> None:
    rope = write_with_divisors(tmp_path / "model.gguf", llama3_divisors(500000.0, 128, 32.0)).rope
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert rope == RopeConfig(rope_type="llama3", theta=500000.0, rotary_dim=128, scaling=scaling)


@pytest.mark.parametrize(
    "divisors",
    [
        np.linspace(1, 8, 64, dtype=np.float32),
        np.full(64, np.nan, np.float32),
        np.full(64, np.inf, np.float32),
        np.ones(63, np.float32),
    ],
)
def test_another_table_is_refused(tmp_path: Path, divisors: np.ndarray) -> None:
    with pytest.raises(ModelLoadError, match=r"tensor rope_freqs\.weight"):
        write_with_divisors(tmp_path / "model.gguf", divisors)


def test_end_of_turn_tokens_are_found_by_kind_and_text(tmp_path: Path) -> None:
    tokens = ["<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", *(f"t{i}" for i in range(252))]
    types = [1, 3, 3, 3] + [1] * 252
    config = llama(
        tmp_path,
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=types,
        tokenizer__ggml__eos_token_id=2,
        tokenizer__ggml__eot_token_id=3,
    )
    assert config.eos_token_ids == (2, 3, 1)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="architecture 'mamba' is not supported in GGUF; llama and gpt2 are"):
        load_gguf_config(read_gguf(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__expert_count": 8}, "field llama.expert_count"),
        ({"llama__rope__freq_base": -1.0}, "field llama.rope.freq_base"),
        ({"llama__rope__scaling__type": "longrope"}, "field llama.rope.scaling.type"),
        ({"llama__rope__scaling__type": "linear"}, "field llama.rope.scaling.factor"),
        ({"llama__attention__key_length": 8}, "field llama.rope.dimension_count"),
        ({"tokenizer__ggml__eos_token_id": 256}, "field tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__bos_token_id": "1"}, "field tokenizer.ggml.bos_token_id"),
        ({"tokenizer__ggml__bos_token_id": [1, 2]}, "field tokenizer.ggml.bos_token_id"),
    ],
)
def test_nonsense_names_file_and_field(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.gguf") as caught:
        llama(tmp_path, **metadata)
    assert message in str(caught.value)
