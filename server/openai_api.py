"""The OpenAI endpoints: which model answers what."""

from __future__ import annotations

import time

from flask import Blueprint, Response, g, request

from .answering import json_response
from .body import read_body
from .chat_api import ChatApi
from .completions_api import CompletionsApi
from .embeddings_api import EmbeddingsApi
from .generation import Service
from .logprob_format import Json
from .model_directory import ModelDirectory
from .protocol import ChatRequest, CompletionRequest, EmbeddingRequest, GenerationFields
from .response_protocol import ResponseRequest
from .responses_api import ResponsesApi


def openai_blueprint(models: ModelDirectory) -> Blueprint:
    """Routes under ``/v1``."""
    routes, api = Blueprint("openai", __name__), OpenAIApi(models)
    routes.post("/v1/completions")(api.completions)
    routes.post("/v1/chat/completions")(api.chat_completions)
    routes.post("/v1/responses")(api.responses)
    routes.post("/v1/embeddings")(api.embeddings)
    routes.get("/v1/models")(api.models)
    routes.get("/v1/models/<path:name>")(api.model)
    return routes


class OpenAIApi:
    """Handlers; each call runs on a request thread."""

    def __init__(self, models: ModelDirectory) -> None:
        self._models = models
        self._started_s = int(time.time())

    def completions(self) -> Response:
        """Continue prompts."""
        body = read_body(request, CompletionRequest, self._models.config)
        return CompletionsApi(self._find(body.fields)).completions(body)

    def chat_completions(self) -> Response:
        """Answer a conversation."""
        body = read_body(request, ChatRequest, self._models.config)
        return ChatApi(self._find(body.fields)).chat_completions(body)

    def responses(self) -> Response:
        """Answer a conversation, in OpenAI's newer shape."""
        body = read_body(request, ResponseRequest, self._models.config)
        return ResponsesApi(self._find(body.fields)).responses(body)

    def embeddings(self) -> Response:
        """Make a vector of each input."""
        body = read_body(request, EmbeddingRequest, self._models.config)
        return EmbeddingsApi(self._find(body.fields)).embeddings(body)

    def models(self) -> Response:
        """List the models that are served, and their versions where a name has any."""
        return json_response({"object": "list", "data": [self._model_card(name) for name in self._models.names()]})

    def model(self, name: str) -> Response:
        """Describe one model."""
        return json_response(self._model_card(name))

    def _find(self, fields: GenerationFields | EmbeddingRequest | ResponseRequest) -> Service:
        """A user, or at least a key, gets the same version of a model every time."""
        return self._models.find(fields.model, fields.user or g.get("api_key"))

    def _model_card(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "cupy-engine",
            "max_model_len": self._models.find(name).front_end.max_model_len,
        }
