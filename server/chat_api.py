"""``POST /v1/chat/completions``"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from flask import Response

from cupy_engine.messages import GenerateRequest
from cupy_engine.sampling_params import SamplingParams

from . import validation
from .answering import Answering, json_response, wants_usage
from .body import Body
from .chat_prompt import messages_of, render_chat
from .protocol import ChatRequest
from .responses import AnswerOptions, Echo, chat_completion
from .streaming import ChatChunks
from .tool_formats import form_of
from .tool_use import tool_use


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that is ready for the engine."""

    prompt: str
    requests: list[GenerateRequest]
    params: SamplingParams
    options: AnswerOptions


class ChatApi(Answering):
    """The handler of chats."""

    def chat_completions(self, body: Body[ChatRequest]) -> Response:
        fields = body.fields
        chat = self.prepare(fields)
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        envelope = self.envelope("chatcmpl", kind, fields)
        generation = self.start(envelope, chat.requests, [chat.prompt])
        if fields.stream:
            chunks = ChatChunks(envelope, chat.options, chat.params.n, include_usage=wants_usage(fields))
            return self.stream(generation, chunks, body)
        with contextlib.closing(generation):
            return json_response(chat_completion(envelope, generation.run()[0], chat.options), body)

    def prepare(self, fields: ChatRequest) -> Chat:
        """Check, render and tokenize. Raises ApiError or InvalidRequestError naming the field at fault."""
        form = form_of(self.config.tool_call_parser, self.front_end.chat_template)
        tools = tool_use(fields, form, self._special_id)
        params = validation.chat_params(fields, self.config, {} if tools is None else tools.sampling_changes(fields))
        messages = messages_of(fields.messages)
        prompt = render_chat(self.front_end, messages, tools.tools if tools else (), fields, form)
        requests = self.make_requests(fields, [prompt], params, add_special_tokens=bool(fields.add_special_tokens))
        does_echo = fields.echo and messages[-1]["role"] == "assistant"
        options = AnswerOptions(
            echoes=[Echo(messages[-1]["content"])] if does_echo else (),
            return_token_ids=self.returns_token_ids(fields),
            prompt_logprobs=fields.prompt_logprobs is not None,
            tools=tools,
        )
        return Chat(prompt, requests, params, options)

    def _special_id(self, text: str) -> int | None:
        tokenizer = self.front_end.tokenizer
        return None if tokenizer is None else tokenizer.special_id(text)
