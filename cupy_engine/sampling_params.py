"""How the next token is chosen: the request's sampling parameters, validated once, frozen thereafter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from cupy_engine.errors import InvalidRequestError
from cupy_engine.structured_outputs import StructuredOutputs

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 20
SEED_RANGE = 1 << 63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters under the OpenAI and vLLM names.

    Args:
        n: sequences to return for the prompt.
        best_of: sequences to generate; the ``n`` with the highest mean log-probability are returned. Default ``n``.
        max_tokens: most tokens to generate; ``None`` means up to the model's context length.
        min_tokens: no end-of-sequence or stop token before this many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens; 0 or -1 means all.
        top_p: sample among the fewest tokens whose probabilities sum to at least this (nucleus sampling).
        min_p: drop tokens less likely than this times the most likely one.
        presence_penalty, frequency_penalty: subtracted from logits of generated tokens, once or per occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: token id → value added to its logit.
        allowed_token_ids: if given, no other token can be chosen.
        bad_words: texts that may not be generated.
        seed: same seed and request give the same tokens, whatever else runs; ``None`` draws one.
        stop: texts that end generation; not part of the output unless ``include_stop_str_in_output``.
        stop_token_ids: token ids that end generation.
        ignore_eos: keep generating past end-of-sequence.
        logprobs: return the log-probability of each generated token and this many alternatives.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put spaces between special tokens in the text.
        truncate_prompt_tokens: keep only this many tokens at the prompt's end.
        structured_outputs: the form that the output must have, such as a JSON schema.

    Raises:
        InvalidRequestError: a value out of range; ``param`` names the field.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences to generate: ``best_of`` or else ``n``."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list: the OpenAI API takes one string for a list of one."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def __post_init__(self) -> None:
        for field, kind in _TYPES.items():
            _check_type(field, getattr(self, field), kind)
        for field, (is_allowed, allowed) in _RULES.items():
            value = getattr(self, field)
            if value is not None and not is_allowed(value):
                raise InvalidRequestError(field, f"{field} must be {allowed}, got {_shorten(value)}")
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequestError("best_of", f"best_of must be at least n = {self.n}, got {self.best_of}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                "min_tokens", f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}"
            )
        if self.num_sequences > 1 and self.is_greedy and self.best_of is not None and self.best_of > 1:
            raise InvalidRequestError("best_of", "best_of must be 1 with temperature 0: all sequences would be equal")
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos", f"ignore_eos must be false with {self.structured_outputs.param}, which ends where it says"
            )


def allowed_values(field: str) -> str | None:
    """What a field may be, in words."""
    return _RULES[field][1] if field in _RULES else None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _between(low: float, high: float) -> tuple[Callable[[float], bool], str]:
    return lambda v: low <= v <= high, f"between {low:g} and {high:g}"


def _at_least(low: int) -> tuple[Callable[[int], bool], str]:
    return lambda v: low <= v < 1 << 31, f"at least {low} and below 2**31"


def _strings(max_count: int, max_chars: int) -> tuple[Callable[[str | list[str]], bool], str]:
    def is_allowed(value: str | list[str]) -> bool:
        strings = [value] if isinstance(value, str) else value
        return len(strings) <= max_count and all(isinstance(s, str) and 0 < len(s) <= max_chars for s in strings)

    return (
        is_allowed,
        f"at most {max_count} non-empty strings of at most {max_chars} characters",
    )


def _token_ids(max_count: int, min_count: int = 0) -> tuple[Callable[[list[int]], bool], str]:
    return (
        lambda v: min_count <= len(v) <= max_count and all(type(t) is int and 0 <= t < 1 << 31 for t in v),
        f"a list of {min_count} to {max_count} token ids",
    )


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("n", "min_tokens", "top_k"), (int,)),
    **dict.fromkeys(
        ("best_of", "max_tokens", "seed", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"), (int, type(None))
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), _NUMBER
    ),
    **dict.fromkeys(("allowed_token_ids", "bad_words", "stop_token_ids"), (list, type(None))),
    "stop": (str, list, type(None)),
    **dict.fromkeys(
        ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"), (bool,)
    ),
    "logit_bias": (dict, type(None)),
    "structured_outputs": (StructuredOutputs, type(None)),
}


def _check_type(field: str, value: Any, kinds: tuple[type, ...]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError(field, f"{field} must be finite, got {value}")
    is_stray_bool = isinstance(value, bool) and bool not in kinds
    if isinstance(value, kinds) and not is_stray_bool:
        return
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise InvalidRequestError(field, f"{field} must be {names}, got {_shorten(value)}")


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": _between(1, MAX_N),
    "best_of": _between(1, MAX_N),
    "max_tokens": _at_least(1),
    "min_tokens": _at_least(0),
    "temperature": _between(0, 100),
    "top_k": _at_least(-1),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": _between(0, 1),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "repetition_penalty": (lambda v: 0 < v <= 100, "above 0 and at most 100"),
    "logit_bias": (
        lambda v: (
            len(v) <= MAX_LOGIT_BIAS
            and all(type(t) is int and 0 <= t < 1 << 31 for t in v)
            and all(isinstance(b, _NUMBER) and not isinstance(b, bool) and -100 <= b <= 100 for b in v.values())
        ),
        f"a map of at most {MAX_LOGIT_BIAS} token ids to values between -100 and 100",
    ),
    "allowed_token_ids": _token_ids(MAX_ALLOWED_TOKEN_IDS, min_count=1),
    "bad_words": _strings(MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
    "seed": (lambda v: -SEED_RANGE <= v < SEED_RANGE, "a 64-bit integer"),
    "stop": _strings(MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS),
    "stop_token_ids": _token_ids(MAX_STOP_TOKEN_IDS),
    "logprobs": _between(0, MAX_LOGPROBS),
    "prompt_logprobs": _between(0, MAX_LOGPROBS),
    "truncate_prompt_tokens": _at_least(1),
}
