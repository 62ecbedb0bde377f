"""The engine in this process, given whole workloads: what throughput and latency have in common."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cupy_engine import Engine

from .option_types import count
from .report import Figures, Report, Row, add_output_arguments, check_output, emit
from .setup import add_engine_arguments, check_room, engine_options
from .workloads import Workload, named_workload

BASELINE_BATCH_SIZE = 32

Measure = Callable[[Engine, Workload], Figures]
MeasureBaseline = Callable[[argparse.Namespace, dict[str, Any], Workload], Row]


def add_arguments(parser: argparse.ArgumentParser, *, default_requests: int) -> None:
    """Workload, baseline, model and output options."""
    what = parser.add_argument_group("workload")
    what.add_argument(
        "--workload",
        nargs="+",
        default=[],
        metavar="NAME",
        help="ttft-N, lat, dec-B, thr-short or thr-long, one or several, instead of the three below",
    )
    what.add_argument("--input-len", type=count, default=128, help="prompt tokens (default: 128)")
    what.add_argument("--output-len", type=count, default=64, help="tokens to generate (default: 64)")
    what.add_argument(
        "--batch-size",
        "--num-requests",
        dest="num_requests",
        type=count,
        default=default_requests,
        help=f"requests, all at once (default: {default_requests})",
    )
    what.add_argument("--repeat", type=count, default=5, help="measured runs, after one to warm up (default: 5)")
    _add_baseline_arguments(parser)
    add_engine_arguments(parser)
    add_output_arguments(parser)


def _add_baseline_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("baseline")
    group.add_argument("--baseline", choices=["transformers"], help="measure this too, in the same run")
    group.add_argument(
        "--compare-with-baseline",
        dest="baseline",
        action="store_const",
        const="transformers",
        help="the same as --baseline transformers",
    )
    group.add_argument(
        "--baseline-batch-size",
        type=count,
        metavar="N",
        help="requests in a static batch (default: 32; in latency, all)",
    )
    group.add_argument(
        "--baseline-requests",
        type=count,
        metavar="N",
        help="requests that the baseline runs (default: as many as ours)",
    )


def run(arguments: argparse.Namespace, measure: Measure, measure_baseline: MeasureBaseline) -> int:
    """Measure every workload, the baseline first, and report; the exit status."""
    workloads = _chosen_workloads(arguments)
    rows, import_s = [], process_age_s()
    with engine_options(arguments) as options:
        if arguments.baseline:
            rows = [measure_baseline(arguments, options, workload) for workload in workloads]
        start_s = time.monotonic()
        with Engine(**options) as engine:
            construct_s = time.monotonic() - start_s
            for workload in workloads:
                check_room(engine, workload.input_len, workload.output_len)
            name = f"cupy-engine, {engine.info.backend}"
            rows = [Row(name, measure(engine, workload)) for workload in workloads] + rows
            about = _describe(engine)
    if len(workloads) > 1:
        labels = [workload.name for workload in workloads] * (1 + bool(arguments.baseline))
        rows = [Row(f"{label}: {row.name}", row.figures) for label, row in zip(labels, rows, strict=True)]
    about |= {"import_s": import_s, "construct_s": construct_s}
    about |= {"workloads": list(map(asdict, workloads)), "repeat": arguments.repeat}
    what = "; ".join(workload.describe() for workload in workloads)
    runs = "1 run" if arguments.repeat == 1 else f"{arguments.repeat} runs"
    title = f"{about['model']}: {what}, {runs}; import {import_s:.1f} s, construction {construct_s:.1f} s"
    emit(Report(title, about, rows), arguments)
    return 0


def process_age_s() -> float:
    """Seconds since this process began, to a hundredth: what interpreter and imports have taken when work begins."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _chosen_workloads(arguments: argparse.Namespace) -> list[Workload]:
    check_output(arguments)
    if arguments.workload:
        return [named_workload(name) for name in arguments.workload]
    return [Workload("custom", arguments.input_len, arguments.output_len, arguments.num_requests)]


def _describe(engine: Engine) -> dict[str, Any]:
    return {
        "model": engine.info.model_name,
        "backend": engine.info.backend,
        "load_format": engine.config.load_format,
    }
