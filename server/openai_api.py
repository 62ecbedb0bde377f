"""The OpenAI endpoints: their routes, and the models there are."""

from __future__ import annotations

import time

from flask import Blueprint, Response

from .answering import check_model, json_response
from .chat_api import ChatApi
from .completions_api import CompletionsApi
from .embeddings_api import EmbeddingsApi
from .generation import Service
from .logprob_format import Json
from .responses_api import ResponsesApi


def openai_blueprint(service: Service) -> Blueprint:
    """Routes under ``/v1``."""
    routes, models = Blueprint("openai", __name__), ModelsApi(service)
    routes.post("/v1/completions")(CompletionsApi(service).completions)
    routes.post("/v1/chat/completions")(ChatApi(service).chat_completions)
    routes.post("/v1/responses")(ResponsesApi(service).responses)
    routes.post("/v1/embeddings")(EmbeddingsApi(service).embeddings)
    routes.get("/v1/models")(models.models)
    routes.get("/v1/models/<path:name>")(models.model)
    return routes


class ModelsApi:
    """``GET /v1/models``"""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._front_end = service.front_end
        self._started_s = int(time.time())

    def models(self) -> Response:
        """List the models that are served."""
        return json_response({"object": "list", "data": [self._model_card()]})

    def model(self, name: str) -> Response:
        """Describe one model."""
        check_model(self._service, name)
        return json_response(self._model_card())

    def _model_card(self) -> Json:
        return {
            "id": self._front_end.model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "cupy-engine",
            "max_model_len": self._front_end.max_model_len,
        }
