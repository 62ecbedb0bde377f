"""Tokenizers rebuilt from GGUF metadata tokenize as the originals do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers_for_tests import byte_level, sentencepiece

from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_file import GGUFFile
from cupy_engine.gguf_tokenizer import build_gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "Hello world, it's 12345 o'clock",
    "It'S  DON'T\n\n\tstop!  ",
    "naïve café Ⅷ ½ ٣٤٥ 你好 🙂",
    "a\r\nb \n c",
    "",
]


def gguf(**metadata: Any) -> GGUFFile:
    arrays = {key: np.array(value) if key in ("token_type", "scores") else value for key, value in metadata.items()}
    return GGUFFile(Path("model.gguf"), {f"tokenizer.ggml.{key}": value for key, value in arrays.items()}, {})


def build(**metadata: Any) -> Tokenizer:
    tokenizer = build_gguf_tokenizer(gguf(**metadata))
    assert tokenizer is not None
    return tokenizer


def byte_level_metadata(pre: str, **others: Any) -> dict[str, Any]:
    """The test tokenizer's own vocabulary and merges."""
    vocabulary = byte_level().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = ["Ġ a", "s t", "o p", "st op", "Ã ©", "ð Ł", "Ġa st"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": merges,
        "token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        **others,
    }


def sentencepiece_metadata(**others: Any) -> dict[str, Any]:
    vocabulary = sentencepiece().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    scores = dict.fromkeys(tokens, -100.0) | {"▁a": -1.0, "st": -2.0, "▁st": -3.0, "op": -4.0, "▁stop": -5.0}
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [scores[token] for token in tokens],
        "token_type": [CONTROL] * 3 + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259),
        **others,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "default"])
@pytest.mark.parametrize("text", TEXTS)
def test_gpt2(pre: str, text: str) -> None:
    assert build(**byte_level_metadata(pre)).encode(text).ids == byte_level().encode(text).ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 1234 DON'T\n\n x", ["it", "'s", "Ġ1234", "ĠDON", "'", "T", "ĊĊ", "Ġx"]),
        ("smollm", "it's 1234 DON'T", ["it", "'s", "Ġ", "1", "2", "3", "4", "ĠDON", "'", "T"]),
        ("llama-bpe", "it's 12345 DON'T\n\n x!\n", ["it", "'s", "Ġ", "123", "45", "ĠDON", "'T", "ĊĊ", "Ġx", "!Ċ"]),
        ("qwen2", "it's 123 DON'T\n\n x!\n", ["it", "'s", "Ġ", "1", "2", "3", "ĠDON", "'T", "ĊĊ", "Ġx", "!Ċ"]),
    ],
)
def test_how_text_is_split_before_merging(pre: str, text: str, pieces: list[str]) -> None:
    splitter = build(**byte_level_metadata(pre)).pre_tokenizer
    assert splitter is not None
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


def test_llama3_takes_whole_words_that_are_tokens() -> None:
    """With ``ignore_merges``, a word in the vocabulary is one token even if no merges lead there."""
    metadata = byte_level_metadata("llama-bpe")
    metadata["tokens"] += ["word"]
    metadata["token_type"] += [NORMAL]
    assert build(**metadata).encode("word", add_special_tokens=False).tokens == ["word"]
    assert len(build(**{**metadata, "pre": "gpt-2"}).encode("word").tokens) == 4


def test_qwen2_composes_characters() -> None:
    tokenizer = build(**byte_level_metadata("qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


@pytest.mark.parametrize("text", ["a stop", "stop", " two  spaces", "tops", "é 🙂", "stop</s>stop a", ""])
def test_sentencepiece(text: str) -> None:
    tokenizer = build(**sentencepiece_metadata())
    expected = sentencepiece().encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.decode(expected) == sentencepiece().decode(expected)


def test_scores_decide_what_merges_first() -> None:
    tokens = ["<unk>", *"abc", "ab", "bc", "abc"]
    types = [UNKNOWN] + [NORMAL] * 6
    metadata = {"model": "llama", "tokens": tokens, "token_type": types, "add_space_prefix": False}
    ab_first = build(**metadata, scores=[0.0, -9, -9, -9, -1, -2, -100])
    bc_first = build(**metadata, scores=[0.0, -9, -9, -9, -2, -1, -100])
    assert ab_first.encode("abbc").tokens == ["ab", "bc"]
    assert ab_first.encode("abc").tokens == bc_first.encode("abc").tokens == ["abc"]
    without_abc = {**metadata, "tokens": tokens[:-1], "token_type": types[:-1]}
    assert build(**without_abc, scores=[0.0, -9, -9, -9, -1, -2]).encode("abc").tokens == ["ab", "c"]
    assert build(**without_abc, scores=[0.0, -9, -9, -9, -2, -1]).encode("abc").tokens == ["a", "bc"]


def test_no_space_is_put_before_the_text() -> None:
    tokenizer = build(**sentencepiece_metadata(add_space_prefix=False))
    ids = tokenizer.encode("stop a", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "stop a"
    assert tokenizer.encode("stop", add_special_tokens=False).tokens == ["st", "op"]


@pytest.mark.parametrize(
    ("metadata", "tokens"),
    [
        (byte_level_metadata("gpt-2", bos_token_id=0, eos_token_id=1), ["a"]),
        (byte_level_metadata("gpt-2", bos_token_id=0, eos_token_id=1, add_bos_token=True), ["<s>", "a"]),
        (byte_level_metadata("gpt-2", bos_token_id=0, eos_token_id=1, add_eos_token=True), ["a", "</s>"]),
        (byte_level_metadata("llama-bpe", bos_token_id=0), ["<s>", "a"]),
        (byte_level_metadata("llama-bpe", bos_token_id=0, add_bos_token=False), ["a"]),
        (byte_level_metadata("llama-bpe"), ["a"]),
        (sentencepiece_metadata(bos_token_id=0), ["<s>", "▁a"]),
        (sentencepiece_metadata(bos_token_id=0, eos_token_id=1, add_eos_token=True), ["<s>", "▁a", "</s>"]),
    ],
)
def test_begin_and_end_tokens(metadata: dict[str, Any], tokens: list[str]) -> None:
    tokenizer = build(**metadata)
    assert tokenizer.encode("a").tokens == tokens
    assert [token for token in tokenizer.encode("a", add_special_tokens=False).tokens if token[0] == "<"] == []


def test_user_defined_tokens_are_found_but_not_special() -> None:
    metadata = byte_level_metadata("gpt-2")
    metadata["tokens"] += ["<tool>"]
    metadata["token_type"] += [USER_DEFINED]
    tokenizer = build(**metadata)
    ids = tokenizer.encode("a<tool>b").ids
    assert "<tool>" in tokenizer.encode("a<tool>b").tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


def test_no_tokenizer_in_the_file() -> None:
    assert build_gguf_tokenizer(gguf()) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level_metadata("poro-chat"), "field tokenizer.ggml.pre: 'poro-chat' is not supported"),
        ({**byte_level_metadata("gpt-2"), "model": "rwkv"}, "field tokenizer.ggml.model: 'rwkv' is not supported"),
        ({**byte_level_metadata("gpt-2"), "tokens": ["a", "a"]}, "field tokenizer.ggml.tokens: must be"),
        ({**byte_level_metadata("gpt-2"), "tokens": None}, "field tokenizer.ggml.tokens: must be"),
        ({**byte_level_metadata("gpt-2"), "merges": None}, "field tokenizer.ggml.merges: must be"),
        ({**byte_level_metadata("gpt-2"), "merges": ["nospace"]}, "metadata is not consistent"),
        ({**byte_level_metadata("gpt-2"), "merges": ["zz yy"]}, "metadata is not consistent"),
        ({**byte_level_metadata("gpt-2"), "token_type": [1]}, "field tokenizer.ggml.token_type: must be"),
        ({**sentencepiece_metadata(), "scores": [1.0]}, "field tokenizer.ggml.scores: must be"),
        (sentencepiece_metadata(bos_token_id=100_000), "field tokenizer.ggml.bos_token_id: must be a token id"),
        (sentencepiece_metadata(add_bos_token="yes"), "field tokenizer.ggml.add_bos_token: must be true or false"),
    ],
)
def test_nonsense_names_the_field(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.gguf: ") as caught:
        build_gguf_tokenizer(gguf(**metadata))
    assert message in str(caught.value)
