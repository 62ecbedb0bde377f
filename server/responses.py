"""Whole answers, in OpenAI's shape with vLLM's additions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cupy_engine import __version__
from cupy_engine.outputs import CompletionOutput, RequestOutput, TokenLogprob

from .logprob_format import Json, chat_logprobs, completion_logprobs, prompt_logprobs
from .tool_answers import ToolReader, message_of
from .tool_use import ToolUse

SYSTEM_FINGERPRINT = f"cupy-engine-{__version__}"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all objects and chunks of one answer share."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "choices": choices,
            **more,
        }


@dataclass(frozen=True, slots=True)
class Echo:
    """What a choice begins with: its prompt. ``first_token``: the text of the prompt's first token."""

    text: str = ""
    first_token: str = ""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How the client wants its answer.

    ``echoes``: one per prompt, if prompts are to be repeated. ``is_prompt_only``: the generated token is left out
    (``max_tokens`` 0 with echo).
    """

    echoes: Sequence[Echo] = ()
    is_prompt_only: bool = False
    return_token_ids: bool = False
    prompt_logprobs: bool = False
    tools: ToolUse | None = None

    def new_reader(self) -> ToolReader | None:
        """Reads calls out of one choice, if there may be any."""
        return None if self.tools is None else ToolReader(self.tools.parser())

    def echo(self, prompt_index: int) -> Echo:
        return self.echoes[prompt_index] if self.echoes else Echo()


def usage(results: Sequence[RequestOutput], *, is_prompt_only: bool = False) -> Json:
    """Tokens read and written, over all prompts and choices."""
    num_prompt = sum(len(result.prompt_token_ids) for result in results)
    num_output = sum(len(output.token_ids) for result in results for output in result.outputs)
    num_output = 0 if is_prompt_only else num_output
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(result.num_cached_tokens for result in results)},
    }


def completion(envelope: Envelope, results: Sequence[RequestOutput], options: AnswerOptions) -> Json:
    """The body of ``POST /v1/completions``: the choices of all prompts in one list."""
    choices: list[Json] = []
    for prompt_index, result in enumerate(results):
        for output in result.outputs:
            choice = _completion_choice(result, output, options, options.echo(prompt_index))
            choices.append({"index": len(choices)} | choice)
    return envelope.wrap(choices, usage=usage(results, is_prompt_only=options.is_prompt_only))


def chat_completion(envelope: Envelope, result: RequestOutput, options: AnswerOptions) -> Json:
    """The body of ``POST /v1/chat/completions``."""
    choices = [_chat_choice(output, options) for output in result.outputs]
    more: Json = {"usage": usage([result])}
    if options.return_token_ids:
        more["prompt_token_ids"] = result.prompt_token_ids
    if options.prompt_logprobs:
        more["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs or [])
    return envelope.wrap(choices, **more)


def _completion_choice(result: RequestOutput, output: CompletionOutput, options: AnswerOptions, echo: Echo) -> Json:
    if options.is_prompt_only:
        no_logprobs: list[TokenLogprob] | None = None if output.logprobs is None else []
        output = CompletionOutput(output.index, logprobs=no_logprobs, finish_reason="length")
    entries = [*((options.echoes and result.prompt_logprobs) or ()), *(output.logprobs or ())]
    choice: Json = {
        "text": echo.text + output.text,
        "logprobs": None if output.logprobs is None else completion_logprobs(entries, echo.first_token),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if options.return_token_ids:
        choice |= {"token_ids": output.token_ids, "prompt_token_ids": result.prompt_token_ids}
    if options.prompt_logprobs:
        choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs or [])
    return choice


def _chat_choice(output: CompletionOutput, options: AnswerOptions) -> Json:
    reader = options.new_reader()
    choice: Json = {
        "index": output.index,
        "message": message_of(options.echo(0).text + output.text, reader),
        "logprobs": None if output.logprobs is None else chat_logprobs(output.logprobs),
        "finish_reason": output.finish_reason if reader is None else reader.finish_reason(output.finish_reason),
        "stop_reason": output.stop_reason,
    }
    if options.return_token_ids:
        choice["token_ids"] = output.token_ids
    return choice
