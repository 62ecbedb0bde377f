"""``POST /v1/responses``: OpenAI's newer shape of a chat. Nothing is stored."""

from __future__ import annotations

import contextlib

from flask import Response

from .answering import json_response
from .body import Body
from .chat_api import ChatApi
from .response_events import ResponseEvents
from .response_input import as_chat, errors_renamed
from .response_protocol import ResponseRequest


class ResponsesApi(ChatApi):
    """The handler of responses: a chat underneath."""

    def responses(self, body: Body[ResponseRequest]) -> Response:
        fields = body.fields
        with errors_renamed():
            chat = self.prepare(as_chat(fields))
            envelope = self.envelope("resp", "response", fields)
            generation = self.start(envelope, chat.requests, [chat.prompt])
            events = ResponseEvents(envelope, fields, chat.options)
            if fields.stream:
                return self.stream(generation, events, body)
            with contextlib.closing(generation):
                return json_response(events.whole(generation.run()[0]), body)
