"""Tokens per second of many requests at once, prompts included."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from cupy_engine.server.cli import main
from tqdm import trange

from cupy_engine import Engine
from cupy_engine.outputs import RequestOutput

from . import offline
from .baseline import run_baseline
from .gpu_clock import busy_figures, require_gpu
from .report import Figure, Figures, Row
from .workloads import Workload

_WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench throughput``."""
    offline.add_arguments(parser, default_requests=16)
    parser.add_argument(
        "--gpu-busy",
        action="store_true",
        help="also measure the share of the time in which the GPU works, and the host's work per step",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""

    def measure(engine: Engine, workload: Workload) -> Figures:
        return _measure(engine, workload, arguments.repeat, watches_gpu=arguments.gpu_busy)

    return offline.run(arguments, measure, _baseline_row)


def _measure(engine: Engine, workload: Workload, repeat: int, *, watches_gpu: bool) -> Figures:
    if watches_gpu:
        require_gpu(engine)
    rng = np.random.default_rng(0)
    run_once(engine, workload, rng, min(_WARM_UP_TOKENS, workload.output_len))
    runs = [run_once(engine, workload, rng, workload.output_len) for _ in trange(repeat, unit="run", disable=None)]
    figures = _rates(workload, [wall_s for wall_s, _ in runs])
    figures["ttft_s"] = Figure.of([median(output.metrics.ttft_s or 0.0 for output in outputs) for _, outputs in runs])
    if workload.output_len > 1:
        figures["time_per_output_token_s"] = Figure.of([median(map(_time_per_token, outputs)) for _, outputs in runs])
    if watches_gpu:  # in a run of its own: watching costs a little
        with busy_figures(engine) as busy:
            run_once(engine, workload, rng, workload.output_len)
        figures |= busy
    return figures


def run_once(
    engine: Engine, workload: Workload, rng: np.random.Generator, output_len: int
) -> tuple[float, list[RequestOutput]]:
    """Wall seconds and outputs."""
    prompts = workload.prompts(engine.frontend.vocab_size, rng)
    start_s = time.monotonic()
    outputs = engine.generate(prompts, workload.sampling_params(output_len), progress=False)
    return time.monotonic() - start_s, outputs


def _rates(workload: Workload, walls_s: list[float]) -> Figures:
    num_output = workload.num_requests * workload.output_len
    num_input = workload.num_requests * workload.input_len
    return {
        "output_tokens_per_s": Figure.of([num_output / wall_s for wall_s in walls_s]),
        "total_tokens_per_s": Figure.of([(num_input + num_output) / wall_s for wall_s in walls_s]),
        "requests_per_s": Figure.of([workload.num_requests / wall_s for wall_s in walls_s]),
    }


def _time_per_token(output: RequestOutput) -> float:
    metrics = output.metrics
    span_s = (metrics.finish_time_s or 0.0) - (metrics.first_token_time_s or 0.0)
    return span_s / (len(output.outputs[0].token_ids) - 1)


def _baseline_row(arguments: argparse.Namespace, options: dict[str, Any], workload: Workload) -> Row:
    """In static batches, one after the other."""
    workload = replace(workload, num_requests=arguments.baseline_requests or workload.num_requests)
    batch_size = min(arguments.baseline_batch_size or offline.BASELINE_BATCH_SIZE, workload.num_requests)
    result = run_baseline(options, workload, batch_size, arguments.repeat)
    name = f"{result.system}, {workload.num_requests} requests in batches of {batch_size}"
    return Row(name, _rates(workload, result.full_s))


if __name__ == "__main__":
    sys.exit(main(["bench", "throughput", *sys.argv[1:]]))
