"""``POST /v1/chat/completions``"""

from __future__ import annotations

import contextlib
from typing import Any

from flask import Response, request

from . import validation
from .answering import Answering, check_model, json_response, wants_usage
from .api_errors import refuse
from .body import read_body
from .generation import Service
from .logprob_format import Json
from .protocol import ChatRequest
from .responses import AnswerOptions, Echo, chat_completion
from .streaming import ChatChunks


class ChatApi(Answering):
    """The handler of chats."""

    def chat_completions(self) -> Response:
        body = read_body(request, ChatRequest, self.config)
        fields = body.fields
        check_model(self.service, fields.model)
        params = validation.chat_params(fields, self.config)
        messages = validation.messages_of(fields.messages)
        prompt = render_chat(self.service, messages, fields)
        requests = self.make_requests(fields, [prompt], params, add_special_tokens=bool(fields.add_special_tokens))
        does_echo = fields.echo and messages[-1]["role"] == "assistant"
        options = AnswerOptions(
            echoes=[Echo(messages[-1]["content"])] if does_echo else (),
            return_token_ids=self.returns_token_ids(fields),
            prompt_logprobs=fields.prompt_logprobs is not None,
        )
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        envelope = self.envelope("chatcmpl", kind, fields)
        generation = self.start(envelope, requests, [prompt])
        if fields.stream:
            chunks = ChatChunks(envelope, options, params.n, include_usage=wants_usage(fields))
            return self.stream(generation, chunks, body)
        with contextlib.closing(generation):
            return json_response(chat_completion(envelope, generation.run()[0], options), body)


def render_chat(service: Service, messages: list[Json], fields: Any) -> str:
    """The prompt text of ``messages``; ``fields`` has the template's options.

    Raises:
        ApiError, InvalidRequestError: the options contradict each other, or the template refuses the messages.
    """
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        refuse("continue_final_message", "continue_final_message excludes add_generation_prompt")
    if continues and messages[-1]["role"] != "assistant":
        refuse("continue_final_message", "continue_final_message needs a last message from the assistant")
    opens = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    return service.front_end.render_chat(
        messages,
        add_generation_prompt=opens,
        continue_final_message=continues,
        **validation.template_kwargs_of(fields.chat_template_kwargs),
    )
