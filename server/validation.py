"""From typed bodies to what the engine takes: sampling parameters, prompts, messages. Contradictions end here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from cupy_engine.sampling_params import SamplingParams
from cupy_engine.structured_outputs import StructuredOutputs

from .api_errors import ApiError, refuse
from .output_form import output_form
from .protocol import ChatRequest, CompletionRequest, GenerationFields, Prompt
from .server_config import ServerConfig

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_PRIORITY_RANGE = 1 << 31


class QueueFields(Protocol):
    """The fields of a request that concern its turn, not its answer."""

    priority: int | None
    cache_salt: str | None
    timeout_s: float | None
    request_id: str | None


def completion_params(fields: CompletionRequest, config: ServerConfig) -> SamplingParams:
    """Raises ApiError or InvalidRequestError naming the field at fault."""
    _check_common(fields, config)
    _check_at_most("logprobs", fields.logprobs, config.max_logprobs)
    _check_at_most("best_of", fields.best_of, config.max_n)
    changes: dict[str, Any] = {}
    if fields.echo:
        if fields.max_tokens == 0:
            changes["max_tokens"] = 1  # one token is generated and left out of the answer: see responses.completion
        if fields.logprobs is not None and fields.prompt_logprobs is None:
            changes["prompt_logprobs"] = fields.logprobs
    if fields.stream and fields.best_of is not None and fields.best_of > (fields.n or 1):
        refuse("best_of", f"best_of must be n = {fields.n or 1} with stream, got {fields.best_of}")
    return _sampling_params(fields, changes)


def chat_params(fields: ChatRequest, config: ServerConfig, changes: dict[str, Any]) -> SamplingParams:
    """``changes``: what the request's tools make of them. Raises ApiError or InvalidRequestError naming a field."""
    _check_common(fields, config)
    _check_at_most("best_of", fields.best_of, config.max_n)
    if fields.stream and fields.best_of is not None and fields.best_of > (fields.n or 1):
        refuse("best_of", f"best_of must be n = {fields.n or 1} with stream, got {fields.best_of}")
    own = {"logprobs": _chat_logprobs(fields, config), "max_tokens": _chat_max_tokens(fields)}
    return _sampling_params(fields, own | changes)


def prompts_of(prompt: Prompt, config: ServerConfig, param: str = "prompt") -> list[str | list[int]]:
    """The prompts in the field ``param``, of which there are four forms.

    Raises:
        ApiError: none, too many, or a mixture.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        refuse(param, f"{param} is empty: give a text, a list of texts, token ids, or a list of lists of token ids")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        refuse(param, f"{param} mixes texts and token ids: give a list of one kind")
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]
    if len(prompt) > config.max_prompts:
        refuse(param, f"{param} must have at most {config.max_prompts} prompts, got {len(prompt)}")
    return prompt  # type: ignore[return-value]


def priority_of(fields: QueueFields, scheduling_policy: str) -> int:
    """Raises ApiError where a priority would mean nothing."""
    priority = fields.priority or 0
    if priority and scheduling_policy != "priority":
        refuse("priority", f"priority must be 0: the server schedules by {scheduling_policy}, got {priority}")
    if not -_PRIORITY_RANGE <= priority < _PRIORITY_RANGE:
        refuse("priority", f"priority must be a 32-bit integer, got {priority}")
    return priority


def timeout_of(fields: QueueFields, config: ServerConfig) -> float:
    """Seconds that the request may take."""
    if fields.timeout_s is None:
        return config.request_timeout_s
    if not 0 < fields.timeout_s <= config.request_timeout_s:
        limit_s = config.request_timeout_s
        refuse("timeout_s", f"timeout_s must be above 0 and at most {limit_s:g}, got {fields.timeout_s}")
    return fields.timeout_s


def check_room(fields: QueueFields, num_prompt_tokens: int, max_model_len: int) -> None:
    """Raises ApiError if the request asks for more tokens than the context has room for after its prompt."""
    names = ("max_completion_tokens", "max_tokens")
    param, wanted = next(((name, n) for name in names if (n := getattr(fields, name, None)) is not None), ("", 0))
    if num_prompt_tokens + wanted > max_model_len:
        raise ApiError(
            400,
            f"{param} = {wanted} after a prompt of {num_prompt_tokens} tokens is more than the context of "
            f"{max_model_len}: ask for at most {max_model_len - num_prompt_tokens}, shorten the prompt, or leave "
            f"{param} out",
            param=param,
            code="context_length_exceeded",
        )


def cache_salt_of(fields: QueueFields, api_key: str | None) -> str:
    """What separates this client's prefix cache from others': its key, and what it asks for."""
    if api_key is None:
        return fields.cache_salt or ""
    return hashlib.sha256(api_key.encode()).hexdigest()[:32] + (fields.cache_salt or "")


def check_request_id(request_id: str | None) -> None:
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        refuse("request_id", "request_id must be 1 to 128 letters, digits or any of _ . : -")


def _check_common(fields: GenerationFields, config: ServerConfig) -> None:
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    _check_at_most("n", fields.n, config.max_n)
    _check_at_most("prompt_logprobs", fields.prompt_logprobs, config.max_logprobs)
    _check_count("stop", stop, config.max_stop_strings)
    _check_count("bad_words", fields.bad_words, config.max_bad_words)
    _check_count("logit_bias", fields.logit_bias, config.max_logit_bias)
    if any(len(text) > config.max_stop_string_chars for text in stop):
        refuse("stop", f"stop must have strings of at most {config.max_stop_string_chars} characters")
    if fields.stream and fields.prompt_logprobs is not None:
        refuse("prompt_logprobs", "prompt_logprobs is not available with stream")
    if fields.stream_options is not None and not fields.stream:
        refuse("stream_options", "stream_options is allowed only with stream")
    check_request_id(fields.request_id)


def _check_at_most(param: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        refuse(param, f"{param} must be at most {limit}, got {value}")


def _check_count(param: str, values: Sequence[Any] | dict[int, float] | None, limit: int) -> None:
    if values is not None and len(values) > limit:
        refuse(param, f"{param} must have at most {limit} entries, got {len(values)}")


def _chat_logprobs(fields: ChatRequest, config: ServerConfig) -> int | None:
    if fields.top_logprobs is None:
        return 0 if fields.logprobs else None
    if not fields.logprobs:
        refuse("top_logprobs", "top_logprobs is allowed only with logprobs: true")
    if not 0 <= fields.top_logprobs <= config.max_logprobs:
        refuse("top_logprobs", f"top_logprobs must be between 0 and {config.max_logprobs}, got {fields.top_logprobs}")
    return fields.top_logprobs


def _chat_max_tokens(fields: ChatRequest) -> int | None:
    newer = fields.max_completion_tokens
    if newer is None:
        return fields.max_tokens
    if newer < 1:
        refuse("max_completion_tokens", f"max_completion_tokens must be at least 1, got {newer}")
    if fields.max_tokens not in (None, newer):
        refuse("max_completion_tokens", f"max_completion_tokens = {newer} contradicts max_tokens = {fields.max_tokens}")
    return newer


def _output_form(fields: GenerationFields, changes: dict[str, Any]) -> StructuredOutputs | None:
    form = output_form(fields)
    if form is not None and form.param != "response_format" and "structured_outputs" in changes:
        refuse(form.param, f"{form.param} cannot go with tools whose calls follow a schema: leave out one of them")
    return form


def _sampling_params(fields: GenerationFields, changes: dict[str, Any]) -> SamplingParams:
    given = msgspec.structs.asdict(fields)
    given["structured_outputs"] = _output_form(fields, changes)
    values = {name: given[name] for name in SamplingParams.__struct_fields__ if given.get(name) is not None}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    return SamplingParams(**(values | changes))
