"""Time to the first token, and time of a decode step.

TTFT is the wall time of ``generate`` for one token per request; a decode step is the time from the last request's first
token to its last one, divided by the tokens in between. Percentiles are over requests (TTFT) and over tokens (ITL, as
the engine hands them out).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
from cupy_engine.server.cli import main
from tqdm import trange

from cupy_engine import Engine
from cupy_engine.outputs import RequestOutput

from . import offline
from .baseline import run_baseline
from .op_clock import OpClock
from .option_types import percentile
from .report import Figure, Figures, Row, percentiles
from .throughput import run_once
from .token_clock import TokenClock
from .workloads import Workload

_WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench latency``."""
    offline.add_arguments(parser, default_requests=1)
    parser.add_argument(
        "--percentiles", type=percentile, nargs="+", default=[], metavar="P", help="of TTFT and ITL, such as 50 90 99"
    )
    parser.add_argument(
        "--host-overhead",
        action="store_true",
        help="also measure the part of a decode step outside the ops (NumPy backend)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    clock = OpClock.installed() if arguments.host_overhead else None

    def measure(engine: Engine, workload: Workload) -> Figures:
        return _measure(engine, workload, arguments.repeat, clock, arguments.percentiles)

    return offline.run(arguments, measure, _baseline_row)


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
    steps_s, overheads, gaps_s = [], [], []
    for _ in trange(repeat, unit="run", disable=None):
        with TokenClock.watching(engine) if which else nullcontext() as tokens:
            outputs = run_once(engine, workload, rng, workload.output_len)[1]
        start_s, end_s = _decode_span(outputs)
        steps_s.append((end_s - start_s) / (workload.output_len - 1))
        if clock is not None:
            overheads.append(1.0 - clock.seconds_between(start_s, end_s) / (end_s - start_s))
        if tokens is not None:
            gaps_s += tokens.gaps_s()
    figures = _step_figures(workload, steps_s) | percentiles("itl_s", gaps_s, which)
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
    batch_size = arguments.baseline_batch_size or workload.num_requests
    result = run_baseline(options, workload, batch_size, arguments.repeat)
    figures: Figures = {"ttft_s": Figure.of(result.first_s)}
    if workload.output_len > 1:
        pairs = zip(result.full_s, result.first_s, strict=True)
        figures |= _step_figures(workload, [(full - first) / (workload.output_len - 1) for full, first in pairs])
    return Row(result.system, figures)


if __name__ == "__main__":
    sys.exit(main(["bench", "latency", *sys.argv[1:]]))
