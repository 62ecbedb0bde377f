"""``cupy-engine generate``: one answer, streamed, with a line of figures."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from cupy_engine.config import EngineConfig
from cupy_engine.engine import Engine
from cupy_engine.errors import InvalidRequestError
from cupy_engine.outputs import CompletionDelta, RequestOutput
from cupy_engine.sampling_params import SamplingParams

from .commands import CLI_SAMPLING_DEFAULTS
from .options import chosen


@dataclass(slots=True)
class Figures:
    """How fast an answer came. Fed with its deltas."""

    num_tokens: int = 0
    start_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def watch(self, deltas: Iterator[CompletionDelta]) -> Iterator[CompletionDelta]:
        self.start_s = time.monotonic()
        for delta in deltas:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.num_tokens += len(delta.token_ids)
            yield delta

    @property
    def ttft_s(self) -> float:
        return max(0.0, self.first_s - self.start_s)

    @property
    def tokens_per_s(self) -> float:
        """After the first token; of the whole, if there is but one."""
        if self.num_tokens > 1 and self.last_s > self.first_s:
            return (self.num_tokens - 1) / (self.last_s - self.first_s)
        return self.num_tokens / max(1e-9, self.last_s - self.start_s)

    def line(self, backend: str) -> str:
        return (
            f"{self.num_tokens} tokens, TTFT {self.ttft_s * 1000:.0f} ms, {self.tokens_per_s:.1f} tokens/s, {backend}"
        )


def make_engine(arguments: Namespace) -> Engine:
    return Engine(**chosen(arguments, EngineConfig) | {"model": arguments.model, "seed": None})


def sampling_params(arguments: Namespace) -> SamplingParams:
    return SamplingParams(**CLI_SAMPLING_DEFAULTS | chosen(arguments, SamplingParams))


def generate(arguments: Namespace) -> int:
    """The command; its exit status."""
    params = sampling_params(arguments)
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    with make_engine(arguments) as engine:
        prompt: Any = text
        if not arguments.raw and engine.frontend.chat_template is not None:
            prompt = [{"role": "user", "content": text}]
            if arguments.system:
                prompt.insert(0, {"role": "system", "content": arguments.system})
        elif arguments.system:
            raise InvalidRequestError(
                "system", "--system needs a chat template, which this model or --raw goes without"
            )
        if arguments.json or params.num_sequences > 1:
            return _generate_whole(engine, prompt, params, arguments.json)
        return _generate_streamed(engine, prompt, params)


def _generate_streamed(engine: Engine, prompt: Any, params: SamplingParams) -> int:
    figures = Figures()
    for delta in figures.watch(engine.stream(prompt, params)):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(figures.line(engine.info.backend) + "\n")
    return 0


def _generate_whole(engine: Engine, prompt: Any, params: SamplingParams, as_json: bool) -> int:
    is_chat = isinstance(prompt, list)
    result = engine.chat(prompt, params)[0] if is_chat else engine.generate(prompt, params)[0]
    figures = _figures_of(result)
    if as_json:
        sys.stdout.write(msgspec.json.encode(_as_json(engine, result, figures)).decode() + "\n")
        return 0
    for output in result.outputs:
        sys.stdout.write(f"[{output.index}] {output.text}\n")
    sys.stderr.write(figures.line(engine.info.backend) + "\n")
    return 0


def _figures_of(result: RequestOutput) -> Figures:
    metrics = result.metrics
    num_tokens = sum(len(output.token_ids) for output in result.outputs)
    first_s = metrics.first_token_time_s or metrics.arrival_time_s
    return Figures(num_tokens, metrics.arrival_time_s, first_s, metrics.finish_time_s or first_s)


def _as_json(engine: Engine, result: RequestOutput, figures: Figures) -> dict[str, Any]:
    return {
        "model": engine.info.model_name,
        "backend": engine.info.backend,
        "outputs": [
            {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason}
            for each in result.outputs
        ],
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_output_tokens": figures.num_tokens,
        "ttft_s": round(figures.ttft_s, 6),
        "tokens_per_s": round(figures.tokens_per_s, 3),
    }
