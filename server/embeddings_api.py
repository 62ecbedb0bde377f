"""``POST /v1/embeddings``: a vector per input, made of a decoder's hidden states."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

from flask import Response

from cupy_engine.errors import EngineError
from cupy_engine.outputs import RequestOutput
from cupy_engine.pooling import unit_vector
from cupy_engine.sampling_params import SamplingParams

from . import validation
from .answering import Answering, json_response
from .api_errors import refuse
from .body import Body
from .protocol import EmbeddingRequest

FLOAT32_BYTES = 4


class EmbeddingsApi(Answering):
    """The handler of embeddings."""

    def embeddings(self, body: Body[EmbeddingRequest]) -> Response:
        fields = body.fields
        validation.check_request_id(fields.request_id)
        if fields.dimensions is not None and fields.dimensions < 1:
            refuse("dimensions", f"dimensions must be at least 1, got {fields.dimensions}")
        inputs = validation.prompts_of(fields.input, self.config, "input")
        params = SamplingParams(max_tokens=1, truncate_prompt_tokens=fields.truncate_prompt_tokens)
        adds_special = fields.add_special_tokens is not False
        pooling = fields.pooling or "mean"
        requests = self.make_requests(fields, inputs, params, add_special_tokens=adds_special, pooling=pooling)
        envelope = self.envelope("embd", "list", fields)
        with contextlib.closing(self.start(envelope, requests, inputs)) as generation:
            results = generation.run()
        num_tokens = sum(len(result.prompt_token_ids) for result in results)
        answer = {
            "object": "list",
            "model": envelope.model,
            "data": [_entry(index, result, fields) for index, result in enumerate(results)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return json_response(answer, body)


def _entry(index: int, result: RequestOutput, fields: EmbeddingRequest) -> dict[str, Any]:
    embedding = result.embedding or b""
    num_dimensions = len(embedding) // FLOAT32_BYTES
    if fields.dimensions is not None and fields.dimensions > num_dimensions:
        limit = f"at most {num_dimensions}, which is what this model has"
        refuse("dimensions", f"dimensions must be {limit}, got {fields.dimensions}")
    try:
        vector = unit_vector(embedding, fields.dimensions)
    except ValueError as error:
        raise EngineError(str(error)) from None
    is_base64 = fields.encoding_format == "base64"
    values = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": values}
