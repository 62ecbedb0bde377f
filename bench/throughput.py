"""Tokens per second of many requests at once, prompts included."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import numpy as np
from cupy_engine.server.cli import main
from tqdm import trange

from cupy_engine import Engine
from cupy_engine.outputs import RequestOutput

from . import baseline
from .report import Figure, Figures, Report, Row, emit
from .setup import add_common_arguments, chosen_workload, describe, engine_options, num_runs
from .workloads import Workload

_WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench throughput``."""
    add_common_arguments(parser, default_requests=16)
    baseline.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    workload = chosen_workload(arguments)
    rows = []
    with engine_options(arguments) as options:
        if arguments.baseline:
            rows.append(_baseline_row(arguments, options, workload))
        with Engine(**options) as engine:
            rows.insert(0, Row(f"cupy-engine, {engine.info.backend}", measure(engine, workload, arguments.repeat)))
            about = describe(engine) | {"workload": asdict(workload), "repeat": arguments.repeat}
    title = f"{about['model']}: {workload.describe()}, {num_runs(arguments)}"
    emit(Report(title, about, rows), arguments)
    return 0


def measure(engine: Engine, workload: Workload, repeat: int) -> Figures:
    """Warm up, then run ``repeat`` times."""
    rng = np.random.default_rng(0)
    run_once(engine, workload, rng, min(_WARM_UP_TOKENS, workload.output_len))
    runs = [run_once(engine, workload, rng, workload.output_len) for _ in trange(repeat, unit="run", disable=None)]
    figures = _rates(workload, [wall_s for wall_s, _ in runs])
    figures["ttft_s"] = Figure.of([median(output.metrics.ttft_s or 0.0 for output in outputs) for _, outputs in runs])
    if workload.output_len > 1:
        figures["time_per_output_token_s"] = Figure.of([median(map(_time_per_token, outputs)) for _, outputs in runs])
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
    workload = replace(workload, num_requests=arguments.baseline_requests or workload.num_requests)
    result = baseline.run_baseline(arguments, options, workload, arguments.baseline_batch_size)
    size = min(arguments.baseline_batch_size, workload.num_requests)
    return Row(
        f"{result.system}, {workload.num_requests} requests in batches of {size}", _rates(workload, result.full_s)
    )


if __name__ == "__main__":
    sys.exit(main(["bench", "throughput", *sys.argv[1:]]))
