"""The chunks of a streamed answer, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cupy_engine.outputs import CompletionDelta, RequestOutput, TokenLogprob

from .generation import Generation, PromptDelta
from .logprob_format import Json, chat_logprobs, completion_logprobs
from .responses import AnswerOptions, Envelope, usage


class Chunks(Protocol):
    """Makes the chunks of one answer."""

    def of(self, arrived: PromptDelta, generation: Generation) -> list[Json]:
        """The chunks that a delta becomes; none if it says nothing yet."""

    def usage(self, results: Sequence[RequestOutput]) -> Json | None:
        """The last chunk, if the client wants one."""


class _ChunksBase:
    def __init__(self, envelope: Envelope, options: AnswerOptions, num_choices: int, *, include_usage: bool) -> None:
        self._envelope = envelope
        self._options = options
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._lengths: dict[int, int] = {}

    def usage(self, results: Sequence[RequestOutput]) -> Json | None:
        if not self._include_usage:
            return None
        return self._envelope.wrap([], usage=usage(results, is_prompt_only=self._options.is_prompt_only))

    def _wrap(self, choice: Json, **more: object) -> Json:
        if self._include_usage:
            more["usage"] = None
        return self._envelope.wrap([choice], **more)

    def _begins(self, choice_index: int) -> bool:
        """Whether this is the first delta of a choice."""
        is_first = choice_index not in self._begun
        self._begun.add(choice_index)
        return is_first

    def _is_silent(self, delta: CompletionDelta) -> bool:
        """Whether a delta has nothing to say but its text: no end, probabilities or ids."""
        return not delta.logprobs and delta.finish_reason is None and not self._options.return_token_ids


class CompletionChunks(_ChunksBase):
    """Chunks of ``POST /v1/completions``: choice ``prompt_index * n + index``, the first with the echoed prompt."""

    def of(self, arrived: PromptDelta, generation: Generation) -> list[Json]:
        delta = arrived.delta
        index = arrived.prompt_index * self._num_choices + delta.index
        if self._begins(index):
            return [self._wrap(self._first_choice(index, arrived, generation.result(arrived.prompt_index)))]
        if not delta.text and self._is_silent(delta):  # half a character, or what may become a stop string
            return []
        return [self._wrap(self._choice(index, delta, delta.text, delta.logprobs))]

    def _first_choice(self, index: int, arrived: PromptDelta, result: RequestOutput) -> Json:
        delta, echo = arrived.delta, self._options.echo(arrived.prompt_index)
        text, entries = delta.text, delta.logprobs
        if self._options.is_prompt_only:  # then this delta is the only one
            text, entries = "", None if entries is None else []
        if entries is not None and self._options.echoes:
            entries = [*(result.prompt_logprobs or ()), *entries]
        choice = self._choice(index, delta, echo.text + text, entries, echo.first_token)
        if self._options.return_token_ids:
            choice["prompt_token_ids"] = result.prompt_token_ids
        return choice

    def _choice(
        self,
        index: int,
        delta: CompletionDelta,
        text: str,
        entries: Sequence[TokenLogprob | None] | None,
        first_token: str = "",
    ) -> Json:
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(text)
        choice: Json = {
            "index": index,
            "text": text,
            "logprobs": None if entries is None else completion_logprobs(entries, first_token, offset),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice


class ChatChunks(_ChunksBase):
    """Chunks of ``POST /v1/chat/completions``: each choice opens with its role."""

    def __init__(self, envelope: Envelope, options: AnswerOptions, num_choices: int, *, include_usage: bool) -> None:
        super().__init__(envelope, options, num_choices, include_usage=include_usage)
        self._readers = [options.new_reader() for _ in range(num_choices)]

    def of(self, arrived: PromptDelta, generation: Generation) -> list[Json]:
        delta = arrived.delta
        opening = [self._opening(delta.index, generation.result(0))] if self._begins(delta.index) else []
        message, finish_reason = self._message(delta)
        if not message and self._is_silent(delta):
            return opening
        choice: Json = {
            "index": delta.index,
            "delta": message,
            "logprobs": None if delta.logprobs is None else chat_logprobs(delta.logprobs),
            "finish_reason": finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return [*opening, self._wrap(choice)]

    def _message(self, delta: CompletionDelta) -> tuple[Json, str | None]:
        """What a delta adds to its choice's message, and why that ends."""
        reader = self._readers[delta.index]
        if reader is None:
            return {"content": delta.text} if delta.text else {}, delta.finish_reason
        text, calls = reader.read(delta.text, is_last=delta.finish_reason is not None)
        message: Json = {"content": text} if text else {}
        if calls:
            message["tool_calls"] = calls
        return message, reader.finish_reason(delta.finish_reason)

    def _opening(self, index: int, result: RequestOutput) -> Json:
        delta = {"role": "assistant", "content": self._options.echo(0).text}
        more = {"prompt_token_ids": result.prompt_token_ids} if self._options.return_token_ids else {}
        return self._wrap({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, **more)
