"""What a caller gets back: whole results and, while streaming, deltas."""

from __future__ import annotations

from dataclasses import dataclass, field

from cupy_engine.messages import FinishReason

StopReason = int | str | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token at some position and its natural-log probability. ``rank`` is 1 for the most likely token.

    ``token`` is its text; a token that is part of a character shows U+FFFD there and its true ``bytes``.
    """

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What a step added to completion ``index``."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt. ``stop_reason`` is the stop string or stop token id that ended it, if one did."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None


@dataclass(slots=True)
class RequestMetrics:
    """Times on the host's monotonic clock, in seconds."""

    arrival_time_s: float
    scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_time_s is None else self.first_token_time_s - self.arrival_time_s


@dataclass(slots=True)
class RequestOutput:
    """The result of one prompt. ``text``, ``token_ids``, ``logprobs``, ``finish_reason`` are the first completion's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    embedding: bytes | None = None  # [H] float32, if one was asked for: see cupy_engine.pooling

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason
