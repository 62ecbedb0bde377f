"""The Python API: an engine in this process.

    from cupy_engine import Engine, SamplingParams

    with Engine(model="smollm2-135m") as engine:
        print(engine.generate("Once upon a time", SamplingParams(max_tokens=20))[0].text)

One background thread owns the core; any number of threads and event loops may call the methods below at once, and what
they ask for runs together in the same batches.
"""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, get_args

from cupy_engine.collector import RequestCollector
from cupy_engine.config import EngineConfig
from cupy_engine.core import CoreInfo, EngineCore
from cupy_engine.core_thread import CoreThread, Outputs
from cupy_engine.errors import InvalidRequestError
from cupy_engine.frontend import FrontEnd
from cupy_engine.messages import EngineStats, GenerateRequest, Pooling, SequenceOutput
from cupy_engine.model_source import resolve_model
from cupy_engine.outputs import CompletionDelta, RequestOutput
from cupy_engine.pooling import unit_vector
from cupy_engine.prompts import (
    Message,
    Prompt,
    is_conversation,
    many_conversations,
    many_prompts,
    one_per_prompt,
    params_of,
    text_or_ids,
)
from cupy_engine.sampling_params import SamplingParams

_PROGRESS_FROM = 8  # prompts


class Engine:
    """A model that generates text.

    Args:
        model: built-in name, folder, ``.gguf`` file or hub id.
        options: the fields of :class:`~cupy_engine.config.EngineConfig` by name.

    Raises:
        ConfigError: a bad option.
        ModelLoadError: the model cannot be found or loaded.
    """

    def __init__(self, model: str = "smollm2-135m", **options: Any) -> None:
        self.config = _for_batches(EngineConfig.from_dict({"model": str(model), **options}))
        files = resolve_model(self.config.model)
        core = EngineCore.from_config(self.config, files)
        self.info: CoreInfo = core.info
        self.frontend = FrontEnd.from_config(self.config, files, core.info.max_model_len)
        self._core = core
        self._thread = CoreThread(core)

    # Generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Complete prompts, all at once, and wait for all.

        Args:
            prompts: one or many of: text, ``{"prompt": text}`` or ``{"prompt_token_ids": [...]}``.
            params: for all prompts, or one per prompt.
            progress: show a progress bar; default: with many prompts on a terminal.
            priority: lower runs earlier, if the engine schedules by priority.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidRequestError: a prompt or parameter cannot be served; nothing has run then.
            EngineError: a request failed.
        """
        return self._generate_all(many_prompts(prompts), params, True, progress, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many: lists of ``{"role": ..., "content": ...}``."""
        prompts = [self.frontend.render_chat(each, **template_kwargs) for each in many_conversations(messages)]
        return self._generate_all(prompts, params, False, progress, 0)

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean") -> list[list[float]]:
        """A vector of length 1 per prompt: the model's last hidden states, their mean or the last token's."""
        if pooling not in get_args(Pooling):
            raise InvalidRequestError("pooling", f"pooling must be mean or last, got {pooling!r}")
        outputs = self._generate_all(many_prompts(prompts), None, True, None, 0, pooling)
        return [unit_vector(output.embedding or b"").tolist() for output in outputs]

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Iterator[CompletionDelta]:
        """Complete a prompt or answer a conversation, piece by piece. Leaving the loop aborts the request."""
        params = params_of(params)
        if params.num_sequences > params.n:
            raise InvalidRequestError("best_of", "best_of cannot be streamed: which is best is known at the end only")
        text, is_chat = self._prompt_of(prompt)
        request = self.frontend.make_request(text, params, request_id=request_id, add_special_tokens=not is_chat)
        return self._stream(request, text)

    async def generate_async(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestOutput:
        """Complete a prompt or answer a conversation without blocking the event loop. Cancelling aborts the request."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Outputs] = asyncio.Queue()
        text, is_chat = self._prompt_of(prompt)
        request = self.frontend.make_request(
            text,
            params_of(params),
            request_id=request_id,
            priority=priority,
            add_special_tokens=not is_chat,
        )
        collector = self.frontend.collector(request, text if isinstance(text, str) else None)

        def receive(outputs: Outputs) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, outputs)

        self._thread.submit(request, receive)
        try:
            while not collector.finished:
                for output in await arrived.get():
                    self._collect(collector, output)
        finally:
            self._release(request.request_id, collector)
        return collector.result()

    def abort(self, request_id: str) -> None:
        """End a request; who waits for it gets what there is, with ``finish_reason`` "abort"."""
        self._thread.abort(request_id)

    def stats(self) -> EngineStats:
        """Queue lengths, blocks and counters, read while the engine runs."""
        return self._core.stats()

    # Opening and closing

    def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stop. What still runs after ``drain_timeout_s`` ends with an error. A second call does nothing."""
        self._thread.close(drain_timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _prompt_of(self, prompt: Prompt | Sequence[Message]) -> tuple[str | list[int], bool]:
        """Text or ids of a prompt, and whether it is a rendered conversation."""
        if is_conversation(prompt):
            return self.frontend.render_chat(prompt), True  # type: ignore[arg-type]
        return text_or_ids(prompt), False

    def _generate_all(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        add_special_tokens: bool,
        progress: bool | None,
        priority: int,
        pooling: Pooling | None = None,
    ) -> list[RequestOutput]:
        all_params = one_per_prompt(params, len(prompts))
        requests = [
            self.frontend.make_request(
                prompt, one, priority=priority, add_special_tokens=add_special_tokens, pooling=pooling
            )
            for prompt, one in zip(prompts, all_params, strict=True)
        ]
        collectors = {
            request.request_id: self.frontend.collector(request, prompt if isinstance(prompt, str) else None)
            for request, prompt in zip(requests, prompts, strict=True)
        }
        arrived: queue.SimpleQueue[Outputs] = queue.SimpleQueue()
        receiver = arrived.put  # one object, so that a step's outputs arrive together
        try:
            for request in requests:
                self._thread.submit(request, receiver)
            self._wait_for_all(collectors, arrived, progress)
        finally:
            for request_id, collector in collectors.items():
                self._release(request_id, collector)
        return [collector.result() for collector in collectors.values()]

    def _wait_for_all(
        self,
        collectors: dict[str, RequestCollector],
        arrived: queue.SimpleQueue[Outputs],
        progress: bool | None,
    ) -> None:
        from tqdm import tqdm

        is_shown = progress if progress is not None else len(collectors) >= _PROGRESS_FROM and sys.stderr.isatty()
        with tqdm(total=len(collectors), unit="prompt", disable=not is_shown) as bar:
            unfinished = set(collectors)
            while unfinished:
                for output in arrived.get():
                    if output.request_id in unfinished:
                        collector = collectors[output.request_id]
                        self._collect(collector, output)
                        if collector.finished:
                            unfinished.remove(output.request_id)
                            bar.update()

    def _stream(self, request: GenerateRequest, prompt: str | list[int]) -> Iterator[CompletionDelta]:
        collector = self.frontend.collector(request, prompt if isinstance(prompt, str) else None)
        arrived: queue.SimpleQueue[Outputs] = queue.SimpleQueue()
        self._thread.submit(request, arrived.put)
        try:
            while not collector.finished:
                for output in arrived.get():
                    yield from self._collect(collector, output)
        finally:
            self._release(request.request_id, collector)

    def _collect(self, collector: RequestCollector, output: SequenceOutput) -> list[CompletionDelta]:
        deltas = collector.add(output)
        for abort in collector.take_aborts():
            self._thread.send(abort)
        return deltas

    def _release(self, request_id: str, collector: RequestCollector) -> None:
        self._thread.release(request_id, is_finished=collector.finished)


def _for_batches(config: EngineConfig) -> EngineConfig:
    """In this process throughput counts more than how evenly tokens come, unless the configuration says otherwise."""
    if config.max_num_mixed_tokens is not None:
        return config
    return replace(config, max_num_mixed_tokens=config.max_num_batched_tokens)
