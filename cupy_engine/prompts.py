"""What the Python API takes as prompts, conversations and parameters: one or many, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cupy_engine.errors import InvalidRequestError
from cupy_engine.sampling_params import SamplingParams

Prompt = str | Sequence[int] | dict[str, Any]
Message = dict[str, Any]


def many_prompts(prompts: Any) -> list[str | list[int]]:
    """Text or token ids of one prompt or of several.

    Raises:
        InvalidRequestError: something else; this and the functions below name what.
    """
    many = [prompts] if isinstance(prompts, (str, dict)) else _listed("prompts", prompts, "a prompt or several")
    return [text_or_ids(prompt) for prompt in many]


def many_conversations(messages: Any) -> list[list[Message]]:
    """One conversation or several."""
    many = _listed("messages", messages, "a list of messages")
    if many and isinstance(many[0], dict):
        return [many]
    return [_listed("messages", each, "a list of messages, or of such lists") for each in many]


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, and not of token ids."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)


def text_or_ids(prompt: Any) -> str | list[int]:
    """What a prompt in any of its forms says."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, dict):
        if isinstance(prompt.get("prompt_token_ids"), list):
            return list(prompt["prompt_token_ids"])
        if isinstance(prompt.get("prompt"), str):
            return str(prompt["prompt"])
        raise InvalidRequestError("prompt", 'a prompt dict needs "prompt": text or "prompt_token_ids": list of ids')
    return _listed("prompt", prompt, "text, token ids or a dict")


def params_of(params: Any) -> SamplingParams:
    """One request's parameters; ``None`` is the defaults."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError("params", f"params must be SamplingParams, got {type(params).__name__}")
    return params


def one_per_prompt(params: Any, num_prompts: int) -> list[SamplingParams]:
    """The parameters of each prompt: the same for all, or a list."""
    if params is None or isinstance(params, SamplingParams):
        return [params_of(params)] * num_prompts
    many = _listed("params", params, "SamplingParams, or a list of them")
    if len(many) != num_prompts:
        raise InvalidRequestError("params", f"{len(many)} sampling parameters for {num_prompts} prompts")
    return [params_of(each) for each in many]


def _listed(param: str, values: Any, wanted: str) -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise InvalidRequestError(param, f"{param} must be {wanted}, got {type(values).__name__}")
    return list(values)
