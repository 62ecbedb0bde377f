"""Tensors of a GGUF file come out as the Hugging Face checkpoint has them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_builder import hf_tensors, write_tiny_gpt2, write_tiny_llama

from cupy_engine import gguf_weights
from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_weights import GGUFWeights
from cupy_engine.model_source import ModelFiles, load_model_config, open_weights


@contextmanager
def opened(path: Path) -> Iterator[GGUFWeights]:
    files = ModelFiles("model", gguf=path)
    weights = open_weights(files, load_model_config(files))
    assert isinstance(weights, GGUFWeights)
    yield weights
    weights.close()


@pytest.mark.parametrize("name", ["llama", "llama-mqa-bias-tied"])
def test_llama_is_exactly_the_checkpoint(tmp_path: Path, name: str) -> None:
    with opened(write_tiny_llama(tmp_path / "model.gguf", name)) as weights:
        for tensor_name, expected in hf_tensors(name).items():
            assert weights.has(tensor_name)
            np.testing.assert_array_equal(weights.take(tensor_name, expected.shape), expected)
        assert weights.unused() == []


def test_gpt2_is_exactly_the_checkpoint(tmp_path: Path) -> None:
    with opened(write_tiny_gpt2(tmp_path / "model.gguf")) as weights:
        for tensor_name, expected in hf_tensors("gpt2").items():
            np.testing.assert_array_equal(weights.take(tensor_name, expected.shape), expected)
        assert weights.unused() == []


@pytest.mark.parametrize("slab_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_tensors_are_dequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, slab_bytes: int
) -> None:
    monkeypatch.setattr(gguf_weights, "_SLAB_BYTES", slab_bytes)
    kind = GGMLQuantizationType[quantization]
    with opened(write_tiny_llama(tmp_path / "model.gguf", quantization=quantization)) as weights:
        for name, original in hf_tensors("llama").items():
            expected = original if original.ndim == 1 else dequantize(quantize(original, kind), kind)
            found = weights.take(name, original.shape)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_stays_as_stored(tmp_path: Path, dtype: str) -> None:
    with opened(write_tiny_llama(tmp_path / "model.gguf", quantization=dtype)) as weights:
        found = weights.take("model.layers.0.self_attn.q_proj.weight", (64, 64))
        assert found.dtype.name == {"F16": "float16", "BF16": "bfloat16"}[dtype]
        expected = hf_tensors("llama")["model.layers.0.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize("max_ahead_bytes", [1, 50_000, 1 << 30])
def test_any_order_of_taking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_ahead_bytes: int) -> None:
    monkeypatch.setattr(gguf_weights, "_MAX_AHEAD_BYTES", max_ahead_bytes)
    tensors = list(hf_tensors("llama").items())
    path = write_tiny_llama(tmp_path / "model.gguf", quantization="Q8_0")
    with opened(path) as in_order:
        expected = {name: in_order.take(name, tensor.shape) for name, tensor in tensors}
    for seed in range(5):
        random.Random(seed).shuffle(tensors)
        with opened(path) as weights:
            for name, tensor in tensors[:-3]:
                np.testing.assert_array_equal(weights.take(name, tensor.shape), expected[name])
            assert sorted(weights.unused()) == sorted(name for name, _ in tensors[-3:])


def test_taking_twice(tmp_path: Path) -> None:
    with opened(write_tiny_llama(tmp_path / "model.gguf", quantization="Q8_0")) as weights:
        first = weights.take("lm_head.weight", (256, 64))
        np.testing.assert_array_equal(weights.take("lm_head.weight", (256, 64)), first)


def test_work_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "_MAX_AHEAD_BYTES", 100_000)
    largest = max(tensor.nbytes for tensor in hf_tensors("llama").values())
    with opened(write_tiny_llama(tmp_path / "model.gguf")) as weights:
        for name, tensor in hf_tensors("llama").items():
            assert weights._ahead_bytes < 100_000 + largest
            weights.take(name, tensor.shape)
        assert weights._ahead_bytes == 0


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with opened(write_tiny_llama(tmp_path / "model.gguf", "llama-mqa-bias-tied")) as weights:
        assert not weights.has("lm_head.weight")
        with pytest.raises(ModelLoadError, match=r"model\.gguf, tensor lm_head\.weight: is missing"):
            weights.take("lm_head.weight", (256, 64))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    with (
        opened(write_tiny_llama(tmp_path / "model.gguf")) as weights,
        pytest.raises(
            ModelLoadError, match=r"tensor model\.norm\.weight: has shape \(64,\), the model needs \(64, 1\)"
        ),
    ):
        weights.take("model.norm.weight", (64, 1))


def test_the_default_model_has_every_tensor(default_model: ModelFiles) -> None:
    config = load_model_config(default_model)
    weights = open_weights(default_model, config)
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    assert embedding.dtype == np.float32
    assert np.isfinite(embedding).all()
    assert 0.05 < embedding.std() < 0.5
    assert len(weights.unused()) == 271
    weights.close()
