"""The OpenAI endpoints: parse, render, tokenize, hand over to the engine, answer."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from flask import Blueprint, Response, g, request

from cupy_engine.errors import InvalidRequestError
from cupy_engine.messages import GenerateRequest
from cupy_engine.sampling_params import SamplingParams

from . import validation
from .api_errors import ApiError, refuse
from .body import Body, ignored_fields_header, read_body
from .event_stream import GUNICORN_RESPONSE, EventStream
from .generation import Generation, Service
from .logprob_format import Json
from .protocol import ChatRequest, CompletionRequest, GenerationFields
from .responses import AnswerOptions, Echo, Envelope, chat_completion, completion
from .streaming import ChatChunks, Chunks, CompletionChunks


def json_response(content: Any, body: Body[Any] | None = None) -> Response:
    """``content`` as JSON, with a warning about fields of ``body`` that were ignored."""
    return _with_warning(Response(msgspec.json.encode(content), mimetype="application/json"), body)


def openai_blueprint(service: Service) -> Blueprint:
    """Routes under ``/v1``."""
    routes, api = Blueprint("openai", __name__), OpenAIApi(service)
    routes.post("/v1/completions")(api.completions)
    routes.post("/v1/chat/completions")(api.chat_completions)
    routes.get("/v1/models")(api.models)
    routes.get("/v1/models/<path:name>")(api.model)
    return routes


class OpenAIApi:
    """Handlers; each call runs on a request thread."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._front_end = service.front_end
        self._config = service.config
        self._started_s = Envelope("", "", "").created

    # Endpoints

    def completions(self) -> Response:
        body = read_body(request, CompletionRequest, self._config)
        fields = body.fields
        check_model(self._service, fields.model)
        params = validation.completion_params(fields, self._config)
        prompts = validation.prompts_of(fields.prompt, self._config)
        adds_special = fields.add_special_tokens is not False
        requests = self._make_requests(fields, prompts, params, add_special_tokens=adds_special)
        options = AnswerOptions(
            echoes=[self._echo(each) for each in requests] if fields.echo else (),
            is_prompt_only=bool(fields.echo) and fields.max_tokens == 0,
            return_token_ids=self._returns_token_ids(fields),
            prompt_logprobs=fields.prompt_logprobs is not None,
        )
        envelope = self._envelope("cmpl", "text_completion", fields)
        generation = self._start(envelope, requests, prompts)
        if fields.stream:
            chunks = CompletionChunks(envelope, options, params.n, include_usage=_wants_usage(fields))
            return self._stream(generation, chunks, body)
        with contextlib.closing(generation):
            return json_response(completion(envelope, generation.run(), options), body)

    def chat_completions(self) -> Response:
        body = read_body(request, ChatRequest, self._config)
        fields = body.fields
        check_model(self._service, fields.model)
        params = validation.chat_params(fields, self._config)
        messages = validation.messages_of(fields.messages)
        prompt = render_chat(self._service, messages, fields)
        requests = self._make_requests(fields, [prompt], params, add_special_tokens=bool(fields.add_special_tokens))
        does_echo = fields.echo and messages[-1]["role"] == "assistant"
        options = AnswerOptions(
            echoes=[Echo(messages[-1]["content"])] if does_echo else (),
            return_token_ids=self._returns_token_ids(fields),
            prompt_logprobs=fields.prompt_logprobs is not None,
        )
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        envelope = self._envelope("chatcmpl", kind, fields)
        generation = self._start(envelope, requests, [prompt])
        if fields.stream:
            chunks = ChatChunks(envelope, options, params.n, include_usage=_wants_usage(fields))
            return self._stream(generation, chunks, body)
        with contextlib.closing(generation):
            return json_response(chat_completion(envelope, generation.run()[0], options), body)

    def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    def model(self, name: str) -> Response:
        check_model(self._service, name)
        return json_response(self._model_card())

    # Their parts

    def _returns_token_ids(self, fields: GenerationFields) -> bool:
        """As asked; by default where there is no text to return."""
        return self._front_end.tokenizer is None if fields.return_token_ids is None else fields.return_token_ids

    def _envelope(self, prefix: str, kind: str, fields: GenerationFields) -> Envelope:
        g.answer_id = f"{prefix}-{fields.request_id or uuid.uuid4().hex}"
        return Envelope(g.answer_id, kind, self._front_end.model_name)

    def _make_requests(
        self,
        fields: GenerationFields,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        *,
        add_special_tokens: bool,
    ) -> list[GenerateRequest]:
        priority = validation.priority_of(fields, self._service.engine_config.scheduling_policy)
        timeout_s = validation.timeout_of(fields, self._config)
        cache_salt = validation.cache_salt_of(fields, g.get("api_key"))
        requests = []
        for prompt in prompts:
            try:
                made = self._front_end.make_request(
                    prompt,
                    params,
                    request_id=self._service.client.new_request_id(),
                    priority=priority,
                    cache_salt=cache_salt,
                    add_special_tokens=add_special_tokens,
                    timeout_s=timeout_s,
                )
            except InvalidRequestError as error:
                raise self._explain(error, prompt, fields) from None
            requests.append(made)
        return requests

    def _explain(self, error: InvalidRequestError, prompt: str | list[int], fields: GenerationFields) -> ApiError:
        """A front end's error in the words of the endpoint: chat has messages where the engine sees a prompt."""
        if error.param != "prompt":
            return ApiError(400, str(error), param=error.param, code="invalid_value")
        tokenizer = self._front_end.tokenizer
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) and tokenizer else prompt
        code = "context_length_exceeded" if len(token_ids) >= self._front_end.max_model_len else "invalid_value"
        return ApiError(400, str(error), param="messages" if isinstance(fields, ChatRequest) else "prompt", code=code)

    def _echo(self, made: GenerateRequest) -> Echo:
        """A prompt as it will be repeated: what is left of it after truncation."""
        tokenizer, token_ids = self._front_end.tokenizer, made.prompt_token_ids
        if tokenizer is None:
            return Echo()
        text = tokenizer.decode(token_ids, skip_special_tokens=made.params.skip_special_tokens)
        return Echo(text, tokenizer.token_bytes(token_ids[0]).decode("utf-8", "replace"))

    def _start(
        self, envelope: Envelope, requests: list[GenerateRequest], prompts: Sequence[str | list[int]]
    ) -> Generation:
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        return Generation(self._service, envelope.id, requests, texts, request.environ.get("gunicorn.socket"))

    def _stream(self, generation: Generation, chunks: Chunks, body: Body[Any]) -> Response:
        """Begin the answer once something has come, so that a refusal still has its own status."""
        try:
            first = generation.receive(self._config.keep_alive_comment_s)
        except Exception:
            generation.close()
            raise
        stream = EventStream(generation, first, chunks, self._config, request.environ.get(GUNICORN_RESPONSE))
        response = Response(stream, mimetype="text/event-stream", direct_passthrough=True)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        return _with_warning(response, body)

    def _model_card(self) -> Json:
        return {
            "id": self._front_end.model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "cupy-engine",
            "max_model_len": self._front_end.max_model_len,
        }


def check_model(service: Service, name: str | None) -> None:
    """Raises ApiError 404 for a model that is not served here. No name means the one that is."""
    served = service.front_end.model_name
    if name is not None and name != served:
        shown = name if len(name) <= 80 else name[:77] + "..."
        message = f"model {shown!r} does not exist here; this server has {served!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


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


def _wants_usage(fields: GenerationFields) -> bool:
    return fields.stream_options is not None and bool(fields.stream_options.include_usage)


def _with_warning(response: Response, body: Body[Any] | None) -> Response:
    if body is not None and body.ignored:
        response.headers["Warning"] = ignored_fields_header(body.ignored)
    return response
