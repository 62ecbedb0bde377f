"""Guides alone: masks, moves, forks, failures, time limits, the cache. The vocabulary is the default model's."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from cupy_engine import guides as guides_module
from cupy_engine.guides import Guide, GuideError, Guides
from cupy_engine.structured_outputs import StructuredOutputs
from cupy_engine.tokenizer import Tokenizer

VOCAB_SIZE = 49152
EOS_IDS = {0, 2}


def grammar_of(**form: object):
    return StructuredOutputs(**form).to_grammar()


def settle(guides: Guides) -> list[GuideError]:
    """Wait for everything under way."""
    errors, end_s = guides.wait(5), time.monotonic() + 10
    while guides._num_moving or guides._compiling or guides._moves:
        errors += guides.wait(1)
        assert time.monotonic() < end_s
    return errors


def allowed(guide: Guide) -> set[int]:
    assert guide.mask is not None
    assert len(guide.mask) == VOCAB_SIZE // 8
    bits = np.unpackbits(np.frombuffer(guide.mask, np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_guide_allows_what_the_grammar_does_and_then_the_end(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.open("a", grammar_of(choice=["yes", "no"]))
    assert guide.mask is None
    assert settle(guides) == []
    texts = {tokenizer.token_bytes(token_id) for token_id in allowed(guide)}
    assert texts == {b"y", b"ye", b"yes", b"n", b"no"}
    (yes,) = ids(tokenizer, "yes")
    guide.accept(yes)
    assert guide.mask is None
    settle(guides)
    assert allowed(guide) == EOS_IDS


def test_no_special_token_is_text(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.open("a", grammar_of(regex="(?s:.*)"))
    settle(guides)
    special = {token_id for token_id in range(VOCAB_SIZE) if tokenizer.is_special(token_id)}
    assert allowed(guide) & special == EOS_IDS
    assert len(allowed(guide)) > 48000


def test_forks_move_on_their_own(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.open("a", grammar_of(choice=["ab", "cd"]))
    settle(guides)
    other = guide.fork()
    (a,), (c,) = ids(tokenizer, "a"), ids(tokenizer, "c")
    guide.accept(a)
    other.accept(c)
    settle(guides)
    assert {tokenizer.token_bytes(token_id) for token_id in allowed(guide)} == {b"b"}
    assert {tokenizer.token_bytes(token_id) for token_id in allowed(other)} == {b"d"}


def test_a_known_grammar_is_ready_at_once_and_the_cache_is_bounded(
    guides: Guides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guides_module, "MAX_CACHED_GRAMMARS", 2)
    for text in ("a", "b", "c"):
        guides.open(text, grammar_of(regex=text))
        settle(guides)
    assert guides.open("d", grammar_of(regex="c")).mask is not None
    assert guides.open("e", grammar_of(regex="a")).mask is None, "the oldest one is forgotten"
    assert len(guides._cache) == 2
    settle(guides)


def test_one_grammar_is_compiled_once_for_all_who_wait(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = guides._compile
    monkeypatch.setattr(guides, "_compile", lambda text, c: (compiled.append(text), compile_one(text, c)))
    waiting = [guides.open(str(i), grammar_of(regex="x+")) for i in range(5)]
    settle(guides)
    assert len(compiled) == 1
    assert all(guide.mask is not None for guide in waiting)
    assert len({id(guide.matcher) for guide in waiting}) == 5


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"json": {"type": "thing"}}, "thing"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"$ref": "http://169.254.169.254/x"}}, "does not fetch"),
        ({"json": {"$ref": "#"}}, "no text fits"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"json": {"type": "string", "pattern": "["}}, "regex"),
    ],
    ids=str,
)
def test_a_grammar_that_makes_no_sense_says_why(guides: Guides, form: dict[str, object], problem: str) -> None:
    guides.open("a", grammar_of(param="guided_x", **form))
    (error,) = settle(guides)
    assert (error.request_id, error.param) == ("a", "guided_x")
    assert error.message.startswith("guided_x is refused: ")
    assert problem in error.message
    assert len(error.message) < 400


def test_a_grammar_that_takes_too_long_is_given_up(vocabulary: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides_module, "MAX_COMPILE_S", 0.02)
    release = threading.Event()
    guides = Guides(lambda: vocabulary, VOCAB_SIZE)
    mask_of = guides._mask_of
    monkeypatch.setattr(guides, "_mask_of", lambda matcher: release.wait(5) and mask_of(matcher))
    guide = guides.open("a", grammar_of(regex="a"))
    errors: list[GuideError] = []
    end_s = time.monotonic() + 5
    while not errors and time.monotonic() < end_s:
        errors += guides.wait(0.01)
    assert [error.message for error in errors] == ["structured_outputs takes more than 0.02 s to compile"]
    release.set()
    guides._compilers.shutdown(wait=True)
    assert guides.collect() == []
    assert guide.mask is None, "what comes late counts for nothing"
    guides.close()


def test_a_grammar_that_grows_without_bounds_fails_on_the_way(guides: Guides) -> None:
    """Every character may begin a match, so that the automaton doubles with each: CVE-2025-48887's kind."""
    guide = guides.open("a", grammar_of(regex="(?s:.*)(a|b).{300}c"))
    settle(guides)
    chance, errors = np.random.default_rng(1), []
    for _ in range(300):
        guide.accept(int(chance.choice(sorted(allowed(guide) - EOS_IDS))))
        start_s = time.monotonic()
        errors = settle(guides)
        assert time.monotonic() - start_s < 1
        if errors:
            break
    assert [error.request_id for error in errors] == ["a"]
    assert "too many states" in errors[0].message
    assert guide.mask is None


HOSTILE = {
    "nested repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}b"},
    "many branches": {"regex": "|".join(f"x{i}.*y{i}" for i in range(5000))},
    "wide counters": {"regex": "(.*a.{400}){4}b"},
    "long strings": {"json": {"type": "string", "maxLength": 10**9}},
    "long arrays": {"json": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}}},
    "many properties": {"json": {"properties": {f"p{i}": {"pattern": f"(a|b)*c.{{{i}}}"} for i in range(2000)}}},
    "many alternatives": {"json": {"anyOf": [{"type": "array", "prefixItems": [{"const": i}]} for i in range(3000)]}},
    "many rules": {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(999)) + 'r999: "a"'},
    "deep nesting": {"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    "gbnf groups": {"grammar": "root ::= " + "(" * 500 + '"a"' + ")" * 500},
}


@pytest.mark.parametrize("form", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_grammars_are_served_or_refused_within_the_limit(guides: Guides, form: dict[str, object]) -> None:
    start_s = time.monotonic()
    try:
        grammar = grammar_of(**form)
    except Exception as error:
        assert type(error).__name__ == "InvalidRequestError"  # noqa: PT017  either outcome is right
    else:
        guide = guides.open("a", grammar)
        errors = settle(guides)
        assert bool(errors) != (guide.mask is not None)
    assert time.monotonic() - start_s < guides_module.MAX_COMPILE_S
