"""Tokens per second of many requests at once, prompts included."""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import numpy as np

from cupy_engine import Engine
from cupy_engine.outputs import RequestOutput

from .setup import Figure, add_common_arguments, chosen_workload, open_engine, report
from .workloads import Workload

_WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench throughput``."""
    add_common_arguments(parser, count="num-requests", default_requests=16)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    workload = chosen_workload(arguments)
    with open_engine(arguments) as engine:
        figures, lines = _measure(engine, workload, arguments.repeat)
        report(arguments, engine, workload, figures, lines)
    return 0


def _measure(engine: Engine, workload: Workload, repeat: int) -> tuple[dict[str, Any], list[str]]:
    rng = np.random.default_rng(0)
    _run_once(engine, workload, rng, min(_WARM_UP_TOKENS, workload.output_len))
    runs = [_run_once(engine, workload, rng, workload.output_len) for _ in range(repeat)]
    walls = [wall_s for wall_s, _ in runs]
    num_output = workload.num_requests * workload.output_len
    num_input = workload.num_requests * workload.input_len
    figures: dict[str, Any] = {
        "output_tokens_per_s": Figure.of([num_output / wall_s for wall_s in walls]),
        "total_tokens_per_s": Figure.of([(num_input + num_output) / wall_s for wall_s in walls]),
        "requests_per_s": Figure.of([workload.num_requests / wall_s for wall_s in walls]),
        "ttft_s": Figure.of([median(output.metrics.ttft_s or 0.0 for output in outputs) for _, outputs in runs]),
    }
    lines = [
        figures["output_tokens_per_s"].line("output", "tokens/s"),
        figures["total_tokens_per_s"].line("input + output", "tokens/s"),
        figures["requests_per_s"].line("requests", "1/s"),
        figures["ttft_s"].scaled(1e3).line("median TTFT", "ms"),
    ]
    if workload.output_len > 1:
        figures["time_per_output_token_s"] = Figure.of([median(map(_time_per_token, outputs)) for _, outputs in runs])
        lines.append(figures["time_per_output_token_s"].scaled(1e3).line("median TPOT", "ms"))
    return figures, lines


def _run_once(
    engine: Engine, workload: Workload, rng: np.random.Generator, output_len: int
) -> tuple[float, list[RequestOutput]]:
    prompts = workload.prompts(engine.frontend.vocab_size, rng)
    start_s = time.monotonic()
    outputs = engine.generate(prompts, workload.sampling_params(output_len), progress=False)
    return time.monotonic() - start_s, outputs


def _time_per_token(output: RequestOutput) -> float:
    metrics = output.metrics
    span_s = (metrics.finish_time_s or 0.0) - (metrics.first_token_time_s or 0.0)
    return span_s / (len(output.outputs[0].token_ids) - 1)


if __name__ == "__main__":
    own_parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(own_parser)
    sys.exit(run(own_parser.parse_args()))
