"""Assembles one request's core outputs into text: detokenizing, stop strings, logprobs, choosing the best of n."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cupy_engine.detokenizer import Detokenizer
from cupy_engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)
from cupy_engine.messages import AbortRequest, GenerateRequest, SequenceOutput, TokenLogprobs
from cupy_engine.outputs import CompletionDelta, CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from cupy_engine.tokenizer import Tokenizer


@dataclass(slots=True)
class _Completion:
    output: CompletionOutput
    detokenizer: Detokenizer | None
    logprob_sum: float = 0.0

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / max(1, len(self.output.token_ids))


class RequestCollector:
    """Text side of a request. Feed it every output; it says what is new, what to abort, and the result."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer | None, prompt: str | None = None) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._metrics = RequestMetrics(request.arrival_time_s)
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._num_cached_tokens = 0
        self._embedding: bytes | None = None
        self._aborts: list[AbortRequest] = []
        self._completions = [self._new_completion(i) for i in range(request.params.num_sequences)]

    def _new_completion(self, index: int) -> _Completion:
        request = self._request
        output = CompletionOutput(index, logprobs=None if request.params.logprobs is None else [])
        if self._tokenizer is None:
            return _Completion(output, None)
        return _Completion(output, Detokenizer(self._tokenizer, request.params, request.prompt_token_ids))

    @property
    def finished(self) -> bool:
        return all(c.output.finish_reason is not None for c in self._completions)

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs as computed, also those that ``best_of`` will drop; 0 if nothing has come yet."""
        if self._metrics.finish_time_s is None:
            return 0
        return len(self._request.prompt_token_ids) + sum(len(c.output.token_ids) for c in self._completions)

    def take_aborts(self) -> list[AbortRequest]:
        """Sequences that the core should stop because their text found a stop string."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def add(self, output: SequenceOutput) -> list[CompletionDelta]:
        """What the output adds to the text; nothing for a sequence that has ended already.

        Raises:
            EngineError: the request failed; the subclass says how.
        """
        if output.finish_reason == "error":
            raise _error_of(output)
        if output.finish_reason == "abort":
            return self.abort()
        self._take_request_facts(output)
        completion = self._completions[output.index]
        if completion.output.finish_reason is not None:
            return []
        return [self._extend(completion, output)]

    def abort(self) -> list[CompletionDelta]:
        """End what has not ended, with ``finish_reason`` "abort"."""
        return [self._abort_one(c) for c in self._completions if c.output.finish_reason is None]

    def _abort_one(self, completion: _Completion) -> CompletionDelta:
        output = completion.output
        rest = completion.detokenizer.flush() if completion.detokenizer else ""
        output.text += rest
        output.finish_reason = "abort"
        self._metrics.finish_time_s = time.monotonic()
        return CompletionDelta(output.index, rest, [], finish_reason="abort")

    def _take_request_facts(self, output: SequenceOutput) -> None:
        now_s = time.monotonic()
        if self._metrics.first_token_time_s is None and output.token_ids:
            self._metrics.first_token_time_s = now_s
        if output.scheduled_time_s is not None:
            self._metrics.scheduled_time_s = output.scheduled_time_s
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = [
                None if found is None else self._decode_logprobs(found) for found in output.prompt_logprobs
            ]
        self._embedding = output.embedding
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        self._metrics.finish_time_s = now_s

    def _extend(self, completion: _Completion, new: SequenceOutput) -> CompletionDelta:
        output, detokenizer = completion.output, completion.detokenizer
        text = ""
        finish_reason, stop_reason = new.finish_reason, new.stop_reason
        if detokenizer is not None:
            text = detokenizer.decode(self._visible(new))
            if finish_reason is not None and detokenizer.stop_string is None:
                text += detokenizer.flush()
        delta = CompletionDelta(output.index, text, new.token_ids, self._logprobs(new), finish_reason, stop_reason)
        if detokenizer is not None and detokenizer.stop_string is not None:
            if finish_reason is None:
                self._aborts.append(AbortRequest(request_id=new.request_id, index=new.index))
            delta = CompletionDelta(output.index, text, new.token_ids, delta.logprobs, "stop", detokenizer.stop_string)
        completion.logprob_sum += sum(lp.logprob for lp in new.logprobs)
        _apply(delta, output)
        return delta

    def _visible(self, new: SequenceOutput) -> list[int]:
        """The tokens whose text counts: not the end-of-sequence or stop token that ended the sequence."""
        ends_with_stop_token = new.finish_reason == "stop" and not self._request.params.include_stop_str_in_output
        return new.token_ids[:-1] if ends_with_stop_token else new.token_ids

    def _logprobs(self, new: SequenceOutput) -> list[TokenLogprob] | None:
        if self._request.params.logprobs is None:
            return None
        return [self._decode_logprobs(lp) for lp in new.logprobs]

    def _decode_logprobs(self, found: TokenLogprobs) -> TokenLogprob:
        top = tuple(
            self._token_logprob(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(found.top, start=1)
        )
        return self._token_logprob(found.token_id, found.logprob, found.rank, top)

    def _token_logprob(
        self, token_id: int, logprob: float, rank: int, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        raw = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return TokenLogprob(token_id, raw.decode("utf-8", "replace"), raw, logprob, rank, top)

    def result(self) -> RequestOutput:
        """The request's result so far: the ``n`` best completions."""
        params = self._request.params
        completions = self._completions
        if params.num_sequences > params.n:
            completions = sorted(completions, key=lambda c: -c.mean_logprob)[: params.n]
            for index, completion in enumerate(completions):
                completion.output.index = index
        for completion in completions:
            if params.logprobs is not None or params.num_sequences > params.n:
                completion.output.cumulative_logprob = completion.logprob_sum
        return RequestOutput(
            self._request.request_id,
            self._prompt,
            self._request.prompt_token_ids,
            [completion.output for completion in completions],
            self._metrics,
            self._prompt_logprobs,
            self._num_cached_tokens,
            self._embedding,
        )


def _apply(delta: CompletionDelta, output: CompletionOutput) -> None:
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if output.logprobs is not None and delta.logprobs is not None:
        output.logprobs.extend(delta.logprobs)
    output.finish_reason = delta.finish_reason
    output.stop_reason = delta.stop_reason


def _error_of(output: SequenceOutput) -> EngineError:
    message = output.error or "the request failed"
    if output.error_kind == "invalid":
        return InvalidRequestError(output.error_param, message)
    if output.error_kind in ("queue_full", "slo_ttft"):
        return QueueFullError(message, output.retry_after_s or 1.0, output.error_kind)
    kinds = {"deadline": DeadlineExceededError, "dead": EngineDeadError}
    return kinds.get(output.error_kind or "", EngineError)(message)
