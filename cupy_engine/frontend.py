"""Everything between text and token ids for one model: no weights, so every HTTP worker can have its own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from cupy_engine.chat_template import ChatTemplate, load_chat_template
from cupy_engine.collector import RequestCollector
from cupy_engine.config import EngineConfig
from cupy_engine.errors import InvalidRequestError
from cupy_engine.messages import GenerateRequest, Pooling
from cupy_engine.model_source import ModelFiles, load_model_config, resolve_model, resolve_tokenizer
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.structured_outputs import Grammar, StructuredOutputs
from cupy_engine.tokenizer import Tokenizer, load_tokenizer


class PromptTooLongError(InvalidRequestError):
    """A prompt that leaves no room for an answer."""


class FrontEnd:
    """Makes core requests of prompts and results of core outputs.

    ``tokenizer`` is ``None`` for a model folder without one: it serves token ids.
    """

    def __init__(
        self,
        model_name: str,
        vocab_size: int,
        max_model_len: int,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
    ) -> None:
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    @classmethod
    def from_config(
        cls, config: EngineConfig, files: ModelFiles | None = None, max_model_len: int | None = None
    ) -> FrontEnd:
        """Load tokenizer and template. ``max_model_len`` is the started engine's, if it is known already."""
        files = files or resolve_model(config.model)
        text_files = resolve_tokenizer(config.tokenizer, files)
        model = load_model_config(files)
        return cls(
            config.served_model_name or files.name,
            model.vocab_size,
            max_model_len or config.max_model_len or model.max_position_embeddings,
            load_tokenizer(text_files),
            load_chat_template(text_files),
        )

    def make_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
        pooling: Pooling | None = None,
        arrival_time_s: float | None = None,
    ) -> GenerateRequest:
        """Tokenize and check. With ``pooling``, the answer is an embedding.

        Args:
            timeout_s: from its arrival on.
            arrival_time_s: monotonic; default: now.

        Raises:
            InvalidRequestError: an empty or too long prompt, an id outside the vocabulary, text without a tokenizer.
        """
        if arrival_time_s is None:
            arrival_time_s = time.monotonic()
        if isinstance(prompt, str) and params.truncate_prompt_tokens is None:
            self._check_chars(prompt)
        token_ids = self._encode(prompt, add_special_tokens)
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        self._check(token_ids, params)
        return GenerateRequest(
            request_id=request_id or uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            params=params,
            bad_words_token_ids=self._encode_bad_words(params.bad_words or ()),
            grammar=self._grammar(params.structured_outputs),
            pooling=pooling,
            priority=priority,
            cache_salt=cache_salt,
            arrival_time_s=arrival_time_s,
            deadline_s=None if timeout_s is None else arrival_time_s + timeout_s,
        )

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt text of a conversation. Tokenize it without special tokens: the template has put them in.

        Raises:
            InvalidRequestError: no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError("messages", f"model {self.model_name} has no chat template; send a plain prompt")
        return self.chat_template.render(
            list(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )

    def collector(self, request: GenerateRequest, prompt: str | None = None) -> RequestCollector:
        """Turns the core's outputs for ``request`` into text."""
        return RequestCollector(request, self.tokenizer, prompt)

    def _encode(self, prompt: str | Sequence[int], add_special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return self._tokenizer_for("prompt").encode(prompt, add_special_tokens=add_special_tokens)

    def _tokenizer_for(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                param, f"model {self.model_name} has no tokenizer: send token ids, no {param} text"
            )
        return self.tokenizer

    def _encode_bad_words(self, words: Iterable[str]) -> list[list[int]]:
        """Token ids of each word, at the start of a text and after a space."""
        found: list[list[int]] = []
        for word in words:
            tokenizer = self._tokenizer_for("bad_words")
            for text in (word, " " + word.lstrip()):
                token_ids = tokenizer.encode(text, add_special_tokens=False)
                if token_ids and token_ids not in found:
                    found.append(token_ids)
        return found

    def _grammar(self, form: StructuredOutputs | None) -> Grammar | None:
        if form is None:
            return None
        self._tokenizer_for(form.param)
        return form.to_grammar()

    def _check_chars(self, prompt: str) -> None:
        """Refuse what cannot fit, whatever its tokens are, without the work of finding them."""
        if len(prompt) <= self.max_model_len:
            return
        limit = self.max_model_len * self._tokenizer_for("prompt").max_token_chars
        if len(prompt) > limit:
            raise PromptTooLongError(
                "prompt",
                f"prompt has {len(prompt)} characters, but {self.max_model_len} tokens, the limit together with "
                f"generated ones, stand for {limit} at most; shorten it or set truncate_prompt_tokens",
            )

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequestError("prompt", "prompt is empty: give at least one token")
        if len(token_ids) >= self.max_model_len:
            raise PromptTooLongError(
                "prompt",
                f"prompt has {len(token_ids)} tokens, but with at least one generated token the limit is "
                f"{self.max_model_len}; shorten it or set truncate_prompt_tokens",
            )
        if params.stop_strings:
            self._tokenizer_for("stop")
        self._check_ids("prompt", token_ids)
        for name in ("allowed_token_ids", "stop_token_ids", "logit_bias"):
            self._check_ids(name, getattr(params, name) or ())

    def _check_ids(self, param: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    param, f"{param} has token id {token_id!r}; ids are integers from 0 to {self.vocab_size - 1}"
                )
