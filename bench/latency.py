"""Time to the first token, and time of a decode step.

TTFT is the wall time of ``generate`` for one token per request; a decode step is the time from the last request's first
token to its last one, divided by the tokens in between. Percentiles are over requests (TTFT) and over tokens (ITL, as
the engine hands them out).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
from cupy_engine.server.cli import main
from tqdm import trange

from cupy_engine import Engine
from cupy_engine.outputs import RequestOutput

from . import baseline
from .op_clock import OpClock
from .report import Figure, Figures, Report, Row, emit, percentiles
from .setup import add_common_arguments, chosen_workload, describe, engine_options, num_runs, require_percentiles
from .throughput import run_once
from .token_clock import TokenClock
from .workloads import Workload

_WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench latency``."""
    add_common_arguments(parser, default_requests=1)
    parser.add_argument(
        "--percentiles", type=float, nargs="+", default=[], metavar="P", help="of TTFT and ITL, such as 50 90 99"
    )
    parser.add_argument(
        "--host-overhead",
        action="store_true",
        help="also measure the part of a decode step outside the ops (NumPy backend)",
    )
    baseline.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    workload = chosen_workload(arguments)
    require_percentiles(arguments)
    clock = OpClock.installed() if arguments.host_overhead else None
    rows = []
    with engine_options(arguments) as options:
        if arguments.baseline:
            rows.append(_baseline_row(arguments, options, workload))
        with Engine(**options) as engine:
            figures = _measure(engine, workload, arguments.repeat, clock, arguments.percentiles)
            rows.insert(0, Row(f"cupy-engine, {engine.info.backend}", figures))
            about = describe(engine) | {"workload": asdict(workload), "repeat": arguments.repeat}
    title = f"{about['model']}: {workload.describe()}, {num_runs(arguments)}"
    emit(Report(title, about, rows), arguments)
    return 0


def _measure(engine: Engine, workload: Workload, repeat: int, clock: OpClock | None, which: list[float]) -> Figures:
    rng = np.random.default_rng(0)
    run_once(engine, workload, rng, min(_WARM_UP_TOKENS, workload.output_len))
    firsts = [run_once(engine, workload, rng, 1) for _ in trange(repeat, unit="first token", disable=None)]
    figures: Figures = {"ttft_s": Figure.of([wall_s for wall_s, _ in firsts])}
    ttfts = [output.metrics.ttft_s or 0.0 for _, outputs in firsts for output in outputs]
    figures |= percentiles("ttft_s", ttfts, which)
    if workload.output_len > 1:
        figures |= _decode_figures(engine, workload, repeat, clock, which, rng)
    return figures


def _decode_figures(
    engine: Engine,
    workload: Workload,
    repeat: int,
    clock: OpClock | None,
    which: list[float],
    rng: np.random.Generator,
) -> Figures:
    tokens = TokenClock.watching(engine) if which else None
    steps, overheads = [], []
    for _ in trange(repeat, unit="run", disable=None):
        outputs = run_once(engine, workload, rng, workload.output_len)[1]
        start_s, end_s = _decode_span(outputs)
        steps.append((end_s - start_s) / (workload.output_len - 1))
        if clock is not None:
            overheads.append(1.0 - clock.seconds_between(start_s, end_s) / (end_s - start_s))
    figures = _step_figures(workload, steps)
    if tokens is not None:
        figures |= percentiles("itl_s", tokens.gaps_s(), which)
    if overheads:
        figures["host_overhead"] = Figure.of(overheads)
    return figures


def _step_figures(workload: Workload, steps_s: list[float]) -> Figures:
    return {
        "decode_step_s": Figure.of(steps_s),
        "decode_tokens_per_s": Figure.of([workload.num_requests / step_s for step_s in steps_s]),
    }


def _decode_span(outputs: list[RequestOutput]) -> tuple[float, float]:
    firsts = [output.metrics.first_token_time_s or 0.0 for output in outputs]
    ends = [output.metrics.finish_time_s or 0.0 for output in outputs]
    return max(firsts), max(ends)


def _baseline_row(arguments: argparse.Namespace, options: dict[str, Any], workload: Workload) -> Row:
    """All requests in one static batch."""
    result = baseline.run_baseline(arguments, options, workload, workload.num_requests)
    figures: Figures = {"ttft_s": Figure.of(result.first_s)}
    if workload.output_len > 1:
        pairs = zip(result.full_s, result.first_s, strict=True)
        figures |= _step_figures(workload, [(full - first) / (workload.output_len - 1) for full, first in pairs])
    return Row(result.system, figures)


if __name__ == "__main__":
    sys.exit(main(["bench", "latency", *sys.argv[1:]]))
