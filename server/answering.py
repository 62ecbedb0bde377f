"""What all endpoints that generate share: from fields to engine requests, and from those to an answer."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from flask import Response, g, request

from cupy_engine.errors import InvalidRequestError
from cupy_engine.frontend import PromptTooLongError
from cupy_engine.messages import GenerateRequest, Pooling
from cupy_engine.sampling_params import SamplingParams

from . import validation
from .api_errors import ApiError
from .body import Body, ignored_fields_header
from .event_stream import GUNICORN_RESPONSE, EventStream
from .generation import Generation, Service
from .protocol import ChatRequest, EmbeddingRequest, GenerationFields
from .responses import Envelope
from .streaming import Chunks
from .validation import QueueFields


def json_response(content: Any, body: Body[Any] | None = None) -> Response:
    """``content`` as JSON, with a warning about fields of ``body`` that were ignored."""
    return _with_warning(Response(msgspec.json.encode(content), mimetype="application/json"), body)


class Answering:
    """The steps of an endpoint that generates. Each call runs on a request thread."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.front_end = service.front_end
        self.config = service.config

    def returns_token_ids(self, fields: GenerationFields) -> bool:
        """As asked; by default where there is no text to return."""
        return self.front_end.tokenizer is None if fields.return_token_ids is None else fields.return_token_ids

    def envelope(self, prefix: str, kind: str, fields: QueueFields) -> Envelope:
        g.answer_id = f"{prefix}-{fields.request_id or uuid.uuid4().hex}"
        return Envelope(g.answer_id, kind, self.front_end.model_name)

    def make_requests(
        self,
        fields: QueueFields,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        *,
        add_special_tokens: bool,
        pooling: Pooling | None = None,
    ) -> list[GenerateRequest]:
        priority = validation.priority_of(fields, self.service.engine_config.scheduling_policy)
        timeout_s = validation.timeout_of(fields, self.config)
        cache_salt = validation.cache_salt_of(fields, g.get("api_key"))
        requests = []
        for prompt in prompts:
            try:
                made = self.front_end.make_request(
                    prompt,
                    params,
                    request_id=self.service.client.new_request_id(),
                    priority=priority,
                    cache_salt=cache_salt,
                    add_special_tokens=add_special_tokens,
                    timeout_s=timeout_s,
                    pooling=pooling,
                    arrival_time_s=g.call.start_s,
                )
            except InvalidRequestError as error:
                raise _explain(error, fields) from None
            requests.append(made)
        longest = max(len(made.prompt_token_ids) for made in requests)
        validation.check_room(fields, longest, self.front_end.max_model_len)
        return requests

    def start(
        self, envelope: Envelope, requests: list[GenerateRequest], prompts: Sequence[str | list[int]]
    ) -> Generation:
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        connection = request.environ.get("gunicorn.socket")
        generation = Generation(self.service, envelope.id, requests, texts, connection, g.get("api_key"), g.call)
        g.call.is_generating = True
        return generation

    def stream(self, generation: Generation, chunks: Chunks, body: Body[Any]) -> Response:
        """Begin the answer once something has come, so that a refusal still has its own status."""
        try:
            first = generation.receive(self.config.keep_alive_comment_s)
        except Exception:
            generation.close()
            raise
        stream = EventStream(generation, first, chunks, self.config, request.environ.get(GUNICORN_RESPONSE))
        response = Response(stream, mimetype="text/event-stream", direct_passthrough=True)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        return _with_warning(response, body)


def _explain(error: InvalidRequestError, fields: QueueFields) -> ApiError:
    """A front end's error in the words of the endpoint: chat has messages where the engine sees a prompt."""
    param = error.param
    if param == "prompt":
        params = ((ChatRequest, "messages"), (EmbeddingRequest, "input"))
        param = next((name for kind, name in params if isinstance(fields, kind)), "prompt")
    code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else "invalid_value"
    return ApiError(400, str(error), param=param, code=code)


def wants_usage(fields: GenerationFields) -> bool:
    return fields.stream_options is not None and bool(fields.stream_options.include_usage)


def _with_warning(response: Response, body: Body[Any] | None) -> Response:
    if body is not None and body.ignored:
        response.headers["Warning"] = ignored_fields_header(body.ignored)
    return response
