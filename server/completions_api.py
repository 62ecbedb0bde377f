"""``POST /v1/completions``"""

from __future__ import annotations

import contextlib

from flask import Response

from cupy_engine.messages import GenerateRequest

from . import validation
from .answering import Answering, json_response, wants_usage
from .body import Body
from .protocol import CompletionRequest
from .responses import AnswerOptions, Echo, completion
from .streaming import CompletionChunks


class CompletionsApi(Answering):
    """The handler of completions."""

    def completions(self, body: Body[CompletionRequest]) -> Response:
        fields = body.fields
        params = validation.completion_params(fields, self.config)
        prompts = validation.prompts_of(fields.prompt, self.config)
        adds_special = fields.add_special_tokens is not False
        requests = self.make_requests(fields, prompts, params, add_special_tokens=adds_special)
        options = AnswerOptions(
            echoes=[self._echo(each) for each in requests] if fields.echo else (),
            is_prompt_only=bool(fields.echo) and fields.max_tokens == 0,
            return_token_ids=self.returns_token_ids(fields),
            prompt_logprobs=fields.prompt_logprobs is not None,
        )
        envelope = self.envelope("cmpl", "text_completion", fields)
        generation = self.start(envelope, requests, prompts)
        if fields.stream:
            chunks = CompletionChunks(envelope, options, params.n, include_usage=wants_usage(fields))
            return self.stream(generation, chunks, body)
        with contextlib.closing(generation):
            return json_response(completion(envelope, generation.run(), options), body)

    def _echo(self, made: GenerateRequest) -> Echo:
        """A prompt as it will be repeated: what is left of it after truncation."""
        tokenizer, token_ids = self.front_end.tokenizer, made.prompt_token_ids
        if tokenizer is None:
            return Echo()
        text = tokenizer.decode(token_ids, skip_special_tokens=made.params.skip_special_tokens)
        return Echo(text, tokenizer.token_bytes(token_ids[0]).decode("utf-8", "replace"))
