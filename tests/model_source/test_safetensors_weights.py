"""Tensors of safetensors folders: exact, mapped, checked."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf_builder import hf_tensors
from golden_data import TINY_MODELS, tiny_model
from safetensors.numpy import save_file

from cupy_engine.errors import ModelLoadError
from cupy_engine.hf_config import load_hf_config
from cupy_engine.safetensors_weights import SafetensorsWeights

CONFIG = load_hf_config(tiny_model("llama"))
TIED_CONFIG = load_hf_config(tiny_model("llama-mqa-bias-tied"))


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    write_index(folder, {name: file for file, tensors in shards.items() for name in tensors})


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tensor_of_the_tiny_models(name: str) -> None:
    weights = SafetensorsWeights(tiny_model(name), load_hf_config(tiny_model(name)))
    for tensor_name, expected in hf_tensors(name).items():
        np.testing.assert_array_equal(weights.take(tensor_name, expected.shape), expected)
    assert weights.unused() == []
    weights.close()


def test_bfloat16_and_float16(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.25], [3e-3, 7e4]], np.float32)
    bfloat16, float16 = values.astype(ml_dtypes.bfloat16), values[:1].astype(np.float16)
    header = {"b": tensor("BF16", [2, 2], 0, 8), "h": tensor("F16", [1, 2], 8, 12)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, bfloat16.tobytes() + float16.tobytes()))
    weights = SafetensorsWeights(tmp_path, CONFIG)
    assert weights.take("b", (2, 2)).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weights.take("b", (2, 2)), bfloat16)
    np.testing.assert_array_equal(weights.take("h", (1, 2)), float16)


def test_nothing_is_copied(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path, CONFIG)
    first, second = weights.take("a", (4,)), weights.take("a", (4,))
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    weights.close()
    assert first.tolist() == [0, 0, 0, 0]


def test_shards(tmp_path: Path) -> None:
    a, b = np.arange(4, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    write_shards(tmp_path, {"model-1.safetensors": {"a": a}, "model-2.safetensors": {"b": b}})
    weights = SafetensorsWeights(tmp_path, CONFIG)
    np.testing.assert_array_equal(weights.take("b", (2, 3)), b)
    assert weights.has("a")
    assert not weights.has("c")
    assert weights.unused() == ["a"]


def test_base_model_checkpoints_lack_the_prefix(tmp_path: Path) -> None:
    arrays = {"h.0.ln_1.weight": np.ones(2, np.float32), "h.0.attn.bias": np.ones((2, 2), np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path, CONFIG)
    assert weights.take("transformer.h.0.ln_1.weight", (2,)).tolist() == [1, 1]
    assert weights.unused() == [], "the attention mask that old GPT-2 files keep is no weight"


def test_a_stored_copy_of_tied_embeddings_is_no_surplus(tmp_path: Path) -> None:
    save_file({"lm_head.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert SafetensorsWeights(tmp_path, TIED_CONFIG).unused() == []
    assert SafetensorsWeights(tmp_path, CONFIG).unused() == ["lm_head.weight"]


def test_missing_tensor_wrong_shape_and_type(tmp_path: Path) -> None:
    header = {"i": tensor("I64", [1], 0, 8)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 8))
    weights = SafetensorsWeights(tmp_path, CONFIG)
    with pytest.raises(ModelLoadError, match="tensor x: is missing"):
        weights.take("x", (1,))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors, tensor i: has shape \(1,\), the model needs \(2,\)"):
        weights.take("i", (2,))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors, tensor i: type I64 is not supported"):
        weights.take("i", (1,))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-1.safetensors": {"a": np.zeros(1, np.float32)}})
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-1\.safetensors: is missing"):
        SafetensorsWeights(tmp_path, CONFIG)


def test_a_shard_without_a_promised_tensor(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model-1.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(ModelLoadError, match=r"model-1\.safetensors, tensor b: .* lacks"):
        SafetensorsWeights(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "pickle.bin", 7, None, ["x"]]
)
def test_the_index_cannot_point_elsewhere(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    write_index(folder, {"a": shard})
    with pytest.raises(ModelLoadError, match=r"index\.json, tensor a: .* is not a safetensors file in the same folder"):
        SafetensorsWeights(folder, CONFIG)


@pytest.mark.parametrize("weight_map", [None, [], "x", 3])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelLoadError, match="field weight_map"):
        SafetensorsWeights(tmp_path, CONFIG)


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="must be converted to safetensors"):
        SafetensorsWeights(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 100) + b"{}",
        safetensors_bytes(b"not json"),
        safetensors_bytes(b"[]"),
        safetensors_bytes(b"\xff\xfe"),
        safetensors_bytes({"a": tensor("F32", [4], 0, 16)}, b"\0" * 15),
        safetensors_bytes({"a": tensor("F32", [4], 0, 16)}, b"\0" * 17),
        safetensors_bytes({"a": tensor("F32", [4], 0, 12)}, b"\0" * 12),
        safetensors_bytes({"a": tensor("F32", [1 << 62, 4], 0, 16)}, b"\0" * 16),
        safetensors_bytes({"a": tensor("F32", [-4], 0, 16)}, b"\0" * 16),
        safetensors_bytes({"a": tensor("F32", [4], -16, 0)}, b"\0" * 16),
        safetensors_bytes({"a": tensor("F32", [4], 16, 0)}, b"\0" * 16),
        safetensors_bytes({"a": tensor("F32", [4], 4, 20)}, b"\0" * 20),
        safetensors_bytes({"a": tensor("F99", [4], 0, 16)}, b"\0" * 16),
        safetensors_bytes({"a": tensor("F32", [4], 0, 16), "b": tensor("F32", [4], 8, 24)}, b"\0" * 24),
        safetensors_bytes({"a": {"dtype": "F32"}}),
        safetensors_bytes({"a": 3}),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        SafetensorsWeights(tmp_path, CONFIG)
