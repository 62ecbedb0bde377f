"""Streaming text: equal to the whole however it is cut, no half characters, stop strings never shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from golden_data import greedy_prompts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, metaspace, sentencepiece, words

from cupy_engine.detokenizer import Detokenizer
from cupy_engine.model_source import ModelFiles
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.tokenizer import Tokenizer, load_tokenizer

BYTE_LEVEL, SENTENCEPIECE = Tokenizer(byte_level()), Tokenizer(sentencepiece())
FAMILIES = {"byte-level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}


def detokenize(
    tokenizer: Tokenizer, steps: Sequence[Sequence[int]], prompt: Sequence[int] = (), **params: object
) -> tuple[str, str | None, list[str]]:
    """All text, the stop string, and the text of each step and of the flush."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), prompt)  # type: ignore[arg-type]
    shown = [detokenizer.decode(step) for step in steps]
    shown.append(detokenizer.flush())
    return "".join(shown), detokenizer.stop_string, shown


def one_by_one(token_ids: Sequence[int]) -> list[list[int]]:
    return [[token_id] for token_id in token_ids]


def split(token_ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    borders = [0, *sorted(cut % (len(token_ids) + 1) for cut in cuts), len(token_ids)]
    return [token_ids[start:end] for start, end in pairwise(borders)]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30)


@pytest.mark.parametrize("prompt", greedy_prompts(), ids=lambda prompt: prompt["name"])
def test_golden_text(default_model: ModelFiles, prompt: dict[str, list[int]]) -> None:
    tokenizer = load_tokenizer(default_model)
    assert tokenizer is not None
    steps = one_by_one(prompt["greedy_token_ids"])
    text, _, shown = detokenize(tokenizer, steps, prompt["prompt_token_ids"])
    assert text == prompt["greedy_text"]
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), cuts=st.lists(st.integers(0, 100)), skip=st.booleans())
def test_any_split_gives_the_text_of_the_whole(family: str, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    tokenizer = FAMILIES[family]
    token_ids = data.draw(ids_of(tokenizer))
    text, _, _ = detokenize(tokenizer, split(token_ids, cuts), skip_special_tokens=skip)
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<")))
def test_no_half_character_is_ever_shown(family: str, data: st.DataObject, text: str) -> None:
    tokenizer = FAMILIES[family]
    _, _, shown = detokenize(tokenizer, one_by_one(tokenizer.encode(text)))
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown) or "\ufffd" in text


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_prompt_and_continuation_are_one_text(family: str, data: st.DataObject) -> None:
    """What comes after a prompt is what the whole text has more than the prompt's (if that ends with a character)."""
    tokenizer = FAMILIES[family]
    prompt = tokenizer.encode(data.draw(st.text("ab é🙂", min_size=1)))
    token_ids = data.draw(ids_of(tokenizer))
    text, _, _ = detokenize(tokenizer, one_by_one(token_ids), prompt)
    assert tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *token_ids])


def reference_stop(pieces: Sequence[str], stops: Sequence[str], min_tokens: int) -> tuple[str, str | None]:
    """Look at the whole text: the match that ends first, past what the first ``min_tokens`` - 1 tokens gave."""
    text = "".join(pieces)
    floor = len("".join(pieces[: max(0, min_tokens - 1)]))
    matches = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > floor
    ]
    if not matches:
        return text, None
    _, start, stop = min(matches)
    return text[:start], stop


STOPS = st.lists(st.text("stop aé", min_size=1, max_size=5), min_size=1, max_size=4)


@given(
    text=st.text("stop aé", max_size=40),
    stops=STOPS,
    cuts=st.lists(st.integers(0, 100)),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
def test_stop_strings_as_a_search_of_the_whole_finds_them(
    text: str, stops: list[str], cuts: list[int], min_tokens: int, include: bool
) -> None:
    token_ids = BYTE_LEVEL.encode(text)
    _, _, pieces = detokenize(BYTE_LEVEL, one_by_one(token_ids))
    expected, stop = reference_stop(pieces[:-1], stops, min_tokens)
    found, stop_string, shown = detokenize(
        BYTE_LEVEL,
        split(token_ids, cuts),
        stop=stops,
        max_tokens=None,
        min_tokens=min_tokens,
        include_stop_str_in_output=include,
    )
    assert stop_string == stop
    assert found == expected + (stop or "" if include else "")
    shown_so_far = ""
    for piece in shown:
        shown_so_far += piece
        assert found.startswith(shown_so_far), "shown text is never taken back"


def test_a_stop_string_across_tokens_leaks_no_prefix() -> None:
    token_ids = [*BYTE_LEVEL.encode("x s"), *BYTE_LEVEL.encode("t"), *BYTE_LEVEL.encode("op y")]
    text, stop, shown = detokenize(BYTE_LEVEL, one_by_one(token_ids), stop=["stop", "top"])
    assert (text, stop) == ("x ", "stop")
    assert "s" not in "".join(shown)


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    text, stop, shown = detokenize(BYTE_LEVEL, one_by_one(BYTE_LEVEL.encode("sto sto")), stop=["stop"])
    assert (text, stop, shown[-1]) == ("sto sto", None, "sto")


def test_text_is_held_back_no_longer_than_needed() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=["xyz" * 80]))
    assert [detokenizer.decode(BYTE_LEVEL.encode(text)) for text in ("abc", "x", "yz", "a")] == ["abc", "", "", "xyza"]


def test_tokens_are_counted_up_to_the_stop() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=["b"]))
    assert detokenizer.decode(BYTE_LEVEL.encode("xyb")[:3] + BYTE_LEVEL.encode("zz")) == "xy"
    assert (detokenizer.stop_string, detokenizer.num_tokens) == ("b", 3)
    assert detokenizer.decode(BYTE_LEVEL.encode("more")) == detokenizer.flush() == ""
    assert detokenizer.num_tokens == 3


def test_the_stop_string_may_stay() -> None:
    steps = one_by_one(BYTE_LEVEL.encode("one. two."))
    assert detokenize(BYTE_LEVEL, steps, stop=["."], include_stop_str_in_output=True)[0] == "one."


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    steps = one_by_one(BYTE_LEVEL.encode("b.b.b.b"))
    assert detokenize(BYTE_LEVEL, steps, stop=["."], min_tokens=3)[0] == "b.b"
    assert detokenize(BYTE_LEVEL, steps, stop=["."], min_tokens=4)[0] == "b.b"
    assert detokenize(BYTE_LEVEL, steps, stop=["."], min_tokens=5)[0] == "b.b.b"


def test_special_tokens_in_the_text() -> None:
    steps = one_by_one([*BYTE_LEVEL.encode("a"), 1, 2, *BYTE_LEVEL.encode("b")])
    assert detokenize(BYTE_LEVEL, steps)[0] == "ab"
    assert detokenize(BYTE_LEVEL, steps, skip_special_tokens=False)[0] == "a</s><|end|>b"
    assert detokenize(BYTE_LEVEL, steps, skip_special_tokens=False, spaces_between_special_tokens=False)[0] == (
        "a</s><|end|>b"
    )


class TestLeadingSpace:
    """Sentencepiece puts a space before every text, and only there it is not real."""

    STOP = tuple(SENTENCEPIECE.encode("stop"))

    def test_stays_after_a_prompt(self) -> None:
        assert detokenize(SENTENCEPIECE, [self.STOP], SENTENCEPIECE.encode("a"))[0] == " stop"

    def test_goes_at_the_start_of_a_text(self) -> None:
        assert detokenize(SENTENCEPIECE, [self.STOP])[0] == "stop"
        assert detokenize(SENTENCEPIECE, [self.STOP], [0])[0] == "stop", "a prompt of <s> alone shows no text"
        assert detokenize(SENTENCEPIECE, [self.STOP], [0], skip_special_tokens=False)[0] == " stop"

    def test_goes_once(self) -> None:
        assert detokenize(SENTENCEPIECE, [self.STOP, self.STOP])[0] == "stop stop"

    @pytest.mark.parametrize("build", [metaspace, words])
    def test_of_words(self, build: object) -> None:
        tokenizer = Tokenizer(build())  # type: ignore[operator]
        ids = tokenizer.encode("hello world")
        assert detokenize(tokenizer, one_by_one(ids))[0] == "hello world"
        assert detokenize(tokenizer, one_by_one(ids), ids)[0] == " hello world"


class TestHalfCharacters:
    FACE = BYTE_LEVEL.encode("🙂")

    def test_are_held_back(self) -> None:
        _, _, shown = detokenize(BYTE_LEVEL, one_by_one(self.FACE))
        assert shown == [*[""] * (len(self.FACE) - 1), "🙂", ""]

    def test_at_the_end_become_a_replacement_character(self) -> None:
        _, _, shown = detokenize(BYTE_LEVEL, one_by_one(self.FACE[:-1]))
        assert shown == [*[""] * (len(self.FACE) - 1), "\ufffd"]

    def test_that_the_prompt_began_are_completed(self) -> None:
        for cut in range(1, len(self.FACE)):
            prompt = [*BYTE_LEVEL.encode("a"), *self.FACE[:cut]]
            assert detokenize(BYTE_LEVEL, one_by_one(self.FACE[cut:]), prompt)[0] == "🙂"

    def test_of_a_whole_prompt_leave_nothing_behind(self) -> None:
        assert detokenize(BYTE_LEVEL, one_by_one(BYTE_LEVEL.encode("é")), BYTE_LEVEL.encode("é🙂"))[0] == "é"


def test_cost_per_token_does_not_grow() -> None:
    """Not with the text, not with half characters, not with beginnings of stop strings."""
    half = BYTE_LEVEL.encode("🙂")[0]
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(max_tokens=None, stop=["a" * 255 + "b", "stop"]))
    token_ids = [half, *BYTE_LEVEL.encode("as")] * 5000

    def seconds() -> float:
        start_s = time.perf_counter()
        for token_id in token_ids:
            detokenizer.decode([token_id])
        return time.perf_counter() - start_s

    first, *rest = (seconds() for _ in range(4))
    assert min(rest) < 3 * first
