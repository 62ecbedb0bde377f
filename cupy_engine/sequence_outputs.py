"""What a step's results become for the caller."""

from __future__ import annotations

from cupy_engine.messages import ErrorKind, SequenceOutput, TokenLogprobs
from cupy_engine.request import Request, Sequence


def take_token(sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> SequenceOutput:
    """Let the sequence take a drawn token. Its first output brings what is known of the prompt."""
    request, stop_token_id = sequence.request, sequence.append(token_id)
    if sequence.guide is not None and sequence.finish_reason is None:
        sequence.guide.accept(token_id)
    output = SequenceOutput(
        request_id=request.request_id,
        index=sequence.index,
        token_ids=[token_id],
        logprobs=[] if logprobs is None else [logprobs],
        finish_reason=sequence.finish_reason,
        stop_reason=stop_token_id,
    )
    if sequence.index == 0 and len(sequence.token_ids) == sequence.num_prompt_tokens + 1:
        output.num_cached_tokens = request.num_cached_tokens
        output.scheduled_time_s = request.first_scheduled_time_s
        if request.wants_prompt_logprobs:
            output.prompt_logprobs = request.prompt_logprobs
            request.wants_prompt_logprobs = False
    return output


def take_embedding(sequence: Sequence, embedding: bytes) -> SequenceOutput:
    """End a sequence whose prompt has been made into a vector."""
    sequence.finish_reason = "stop"
    request = sequence.request
    return SequenceOutput(
        request_id=request.request_id,
        embedding=embedding,
        num_cached_tokens=request.num_cached_tokens,
        finish_reason="stop",
    )


def error_output(request: Request, reason: str, kind: ErrorKind, param: str | None = None) -> SequenceOutput:
    """The last output of a request that has failed; ``param`` names the field at fault, if one is."""
    return SequenceOutput(
        request_id=request.request_id, finish_reason="error", error=reason, error_kind=kind, error_param=param
    )
