"""Encoding, decoding and the bytes of single tokens, for each family of tokenizers."""

from __future__ import annotations

import json
import random
import resource
import string
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from golden_data import greedy_prompts, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers_for_tests import byte_level, metaspace, sentencepiece, words

from cupy_engine.errors import InvalidRequestError, ModelLoadError
from cupy_engine.model_source import ModelFiles
from cupy_engine.tokenizer import LONG_TEXT_CHARS, Tokenizer, load_tokenizer

BYTE_LEVEL, SENTENCEPIECE = Tokenizer(byte_level()), Tokenizer(sentencepiece())


@pytest.fixture(scope="module")
def smollm2(default_model: ModelFiles) -> Tokenizer:
    tokenizer = load_tokenizer(default_model)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("prompt", greedy_prompts(), ids=lambda prompt: prompt["name"])
def test_golden_prompts(smollm2: Tokenizer, prompt: dict[str, object]) -> None:
    assert smollm2.encode(str(prompt["prompt"]), add_special_tokens=False) == prompt["prompt_token_ids"]
    assert smollm2.decode(prompt["greedy_token_ids"]) == prompt["greedy_text"]  # type: ignore[arg-type]
    assert smollm2.decode(prompt["prompt_token_ids"], skip_special_tokens=False) == prompt["prompt"]  # type: ignore[arg-type]


def test_roles_and_size_of_the_default_model(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2.vocab_size == 49152
    assert smollm2.is_special(0)
    assert not smollm2.is_special(28)
    assert smollm2.encode("Hello") == smollm2.encode("Hello", add_special_tokens=False)


def test_numbers_are_split_into_digits(smollm2: Tokenizer) -> None:
    assert [smollm2.token_text(token_id) for token_id in smollm2.encode("in 1969")] == ["in", " ", "1", "9", "6", "9"]


@given(st.text())
def test_any_text_survives(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_characters="▁<", exclude_categories=["Cs"])))
def test_any_text_survives_sentencepiece(text: str) -> None:
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == text


@pytest.mark.parametrize("build", [byte_level, sentencepiece, metaspace, words])
@pytest.mark.parametrize("skip", [True, False])
def test_decoding_agrees_with_the_library(build: Callable[[], tokenizers.Tokenizer], skip: bool) -> None:
    backend, tokenizer = build(), Tokenizer(build())
    for text in ("hello world", "a stop, a cast", "café 🙂 über", "<s>hello world</s>", " two  spaces ", ""):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1)))
def test_byte_level_decoding_agrees_on_any_ids(ids: list[int]) -> None:
    assert BYTE_LEVEL.decode(ids) == byte_level_backend.decode(ids)


byte_level_backend = byte_level()


def test_bytes_of_a_character_in_parts(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    assert b"".join(smollm2.token_bytes(token_id) for token_id in ids) == "🙂".encode()
    assert smollm2.token_text(ids[0]).endswith("\ufffd")


def test_bytes_of_sentencepiece_tokens() -> None:
    space_a, newline = SENTENCEPIECE.encode("a\n")
    assert (SENTENCEPIECE.token_bytes(space_a), SENTENCEPIECE.token_bytes(newline)) == (b" a", b"\n")
    assert SENTENCEPIECE.token_text(newline) == "\n"


@pytest.mark.parametrize("token_id", [-1, 10_000, 1 << 31, 1 << 40])
def test_ids_without_a_token_are_nothing(token_id: int) -> None:
    assert BYTE_LEVEL.token_bytes(token_id) == b""
    assert BYTE_LEVEL.decode([3, token_id, 4]) == BYTE_LEVEL.decode([3, 4])
    assert not BYTE_LEVEL.is_special(token_id)


def test_a_lone_surrogate_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequestError, match="lone surrogate") as caught:
        BYTE_LEVEL.encode("half \ud83d")
    assert caught.value.param == "prompt"


def test_special_tokens_in_the_text_are_recognized() -> None:
    ids = BYTE_LEVEL.encode("<s>a")
    assert ids[0] == 0
    assert BYTE_LEVEL.decode(ids) == "a"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "<s>a"


def test_truncation_in_the_file_does_not_cut_prompts() -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend).encode("a long prompt")) == len(byte_level().encode("a long prompt").ids)


def test_an_unknown_decoder_is_refused() -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match="decoder has an unknown step"):
        Tokenizer(backend)


def test_many_threads(smollm2: Tokenizer) -> None:
    prompts = greedy_prompts()
    failures: list[str] = []

    def check() -> None:
        for prompt in prompts * 3:
            ids = smollm2.encode(prompt["prompt"], add_special_tokens=False)
            if ids != prompt["prompt_token_ids"] or smollm2.decode(ids, skip_special_tokens=False) != prompt["prompt"]:
                failures.append(prompt["name"])

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_long_words_are_not_kept(smollm2: Tokenizer) -> None:
    chance, start_bytes = random.Random(0), resident_bytes()
    for _ in range(30):
        smollm2.encode(" ".join("".join(chance.choices(string.ascii_lowercase, k=240)) for _ in range(100)))
    assert resident_bytes() - start_bytes < 8 << 20


@pytest.mark.parametrize("num_chars", [LONG_TEXT_CHARS, LONG_TEXT_CHARS + 1])
def test_a_long_text_is_encoded_as_any(num_chars: int) -> None:
    text = ("a stop, a cast " * num_chars)[:num_chars]
    assert BYTE_LEVEL.encode(text) == byte_level_backend.encode(text).ids
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        BYTE_LEVEL.encode(text + "\ud83d")


def test_long_texts_do_not_take_memory_for_each_thread(smollm2: Tokenizer) -> None:
    text, has_ended = "1" * 150_000, threading.Event()

    def encode(gate: threading.Barrier) -> None:
        smollm2.encode(text)
        gate.wait()
        has_ended.wait()

    num_bytes = [resident_bytes()]
    threads: list[threading.Thread] = []
    for num_threads in (1, 6):
        gate = threading.Barrier(num_threads + 1)
        threads += [threading.Thread(target=encode, args=(gate,)) for _ in range(num_threads)]
        for thread in threads[-num_threads:]:
            thread.start()
        gate.wait()
        num_bytes.append(resident_bytes())
    has_ended.set()
    for thread in threads:
        thread.join()
    start, after_one, after_all = num_bytes
    assert after_all - after_one < 2 * max(after_one - start, 16 << 20)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class TestFolder:
    def test_tokenizer_and_roles(self, tmp_path: Path) -> None:
        byte_level().save(str(tmp_path / "tokenizer.json"))
        roles = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|end|>"}))
        tokenizer = load_tokenizer(ModelFiles("model", folder=tmp_path))
        assert tokenizer is not None
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)

    def test_none_is_allowed(self) -> None:
        assert load_tokenizer(ModelFiles("llama", folder=tiny_model("llama"))) is None

    @pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
    def test_another_format_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(ModelLoadError, match=f"{name} cannot be read; convert it to tokenizer.json"):
            load_tokenizer(ModelFiles("model", folder=tmp_path))
