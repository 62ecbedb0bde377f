"""Cut, flipped and overwritten model files load or raise ModelLoadError: never another exception, crash or warning."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from gguf_builder import hf_tensors, write_tiny_llama
from golden_data import tiny_model

from cupy_engine.chat_template import load_chat_template
from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_file import read_gguf
from cupy_engine.hf_config import load_hf_config
from cupy_engine.model_source import ModelFiles, load_model_config, open_weights
from cupy_engine.safetensors_weights import SafetensorsWeights
from cupy_engine.tokenizer import load_tokenizer

NUM_TRIALS = 300
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer__ggml__model": "llama",
    "tokenizer__ggml__tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(250)), "▁", "a", "▁a"],
    "tokenizer__ggml__scores": [float(-rank) for rank in range(256)],
    "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 250 + [1] * 3,
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 2,
    "tokenizer__chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
BYTE_LEVEL: dict[str, Any] = {
    "tokenizer__ggml__model": "gpt2",
    "tokenizer__ggml__pre": "llama-bpe",
    "tokenizer__ggml__tokens": ["<|end|>", "<|begin|>", "ab", "bc", "abc", *(chr(33 + i) for i in range(94))],
    "tokenizer__ggml__merges": ["a b", "b c", "ab c"],
    "tokenizer__ggml__token_type": [3, 3] + [1] * 97,
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 0,
}


def damage(content: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """Cut the file, or change up to ten bytes of its header."""
    if rng.random() < 0.2:
        return content[: rng.randrange(rng.choice((header_bytes, len(content))))]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 10))):
        position = rng.randrange(header_bytes)
        changed[position] = rng.choice((0, 127, 128, 255, changed[position] ^ 1 << rng.randrange(8)))
    return bytes(changed)


def load_all(files: ModelFiles) -> None:
    config = load_model_config(files)
    load_tokenizer(files)
    load_chat_template(files)
    weights = open_weights(files, config)
    try:
        for name, tensor in hf_tensors("llama").items():
            weights.take(name, tensor.shape)
    finally:
        weights.close()


@pytest.mark.parametrize("metadata", [SENTENCEPIECE, BYTE_LEVEL], ids=["sentencepiece", "byte-level"])
def test_damaged_gguf(tmp_path: Path, metadata: dict[str, Any]) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf", quantization="Q8_0", **metadata)
    content = path.read_bytes()
    load_all(ModelFiles("model", gguf=path))
    header_bytes = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    rng = random.Random(20)
    errors: list[ModelLoadError] = []
    for _ in range(NUM_TRIALS):
        path.write_bytes(damage(content, header_bytes, rng))
        try:
            load_all(ModelFiles("model", gguf=path))
        except ModelLoadError as error:
            errors.append(error)
    assert len(errors) > NUM_TRIALS // 2
    assert [error for error in errors if str(path) not in str(error)] == []


def test_damaged_safetensors(tmp_path: Path) -> None:
    content = (tiny_model("llama") / "model.safetensors").read_bytes()
    config = load_hf_config(tiny_model("llama"))
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(21)
    num_refused = 0
    for _ in range(NUM_TRIALS):
        (tmp_path / "model.safetensors").write_bytes(damage(content, header_bytes, rng))
        try:
            weights = SafetensorsWeights(tmp_path, config)
            for name, tensor in hf_tensors("llama").items():
                weights.take(name, tensor.shape)
        except ModelLoadError:
            num_refused += 1
    assert num_refused > NUM_TRIALS // 2


def copy_tiny_llama(folder: Path) -> ModelFiles:
    for file in tiny_model("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return ModelFiles("model", folder=folder)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_json(tmp_path: Path, name: str, content: bytes) -> None:
    files = copy_tiny_llama(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=name.replace(".", r"\.")):
        load_all(files)


@pytest.mark.parametrize("content", [b"{}", b'{"version": "9"}', b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_json_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    files = copy_tiny_llama(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: is not a readable tokenizer"):
        load_tokenizer(files)
