"""What the benchmarks have in common: their options, the engine, figures and how they are printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from cupy_engine.server.options import add_options, chosen

from cupy_engine import Engine
from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError

from .workloads import SHAPES, Workload, named_workload, write_shape

BENCH_DEFAULTS = {"enable_prefix_caching": False, "seed": 0}


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several runs and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> Figure:
        """In another unit."""
        return Figure(self.median * factor, self.low * factor, self.high * factor)

    def line(self, label: str, unit: str) -> str:
        return f"  {label:<15} {_number(self.median):>8} {unit:<8} ({_number(self.low)} – {_number(self.high)})"


def add_common_arguments(parser: argparse.ArgumentParser, *, count: str, default_requests: int) -> None:
    """Workload, model and output options; ``count`` names the one for the number of requests."""
    what = parser.add_argument_group("workload")
    what.add_argument("--workload", help="ttft-N, lat, dec-B, thr-short or thr-long, instead of the three below")
    what.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    what.add_argument("--output-len", type=int, default=64, help="tokens to generate (default: 64)")
    what.add_argument(
        f"--{count}", dest="num_requests", type=int, default=default_requests, help=f"(default: {default_requests})"
    )
    what.add_argument("--repeat", type=int, default=5, help="measured runs, after one to warm up (default: 5)")
    what.add_argument("--json", action="store_true", help="print JSON")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "-m",
        "--model",
        default="smollm2-135m",
        help=f"built-in name, folder, .gguf file or hub id; with --load-format dummy also {', '.join(SHAPES)} "
        "(default: smollm2-135m)",
    )
    add_options(engine, EngineConfig, skip=("model",), defaults=BENCH_DEFAULTS)


def chosen_workload(arguments: argparse.Namespace) -> Workload:
    """The workload that the command line asks for.

    Raises:
        ConfigError: an unknown name, or a number below 1.
    """
    for name in ("input_len", "output_len", "num_requests", "repeat"):
        if getattr(arguments, name) < 1:
            raise ConfigError(name, f"must be at least 1, got {getattr(arguments, name)}")
    if arguments.workload:
        return named_workload(arguments.workload)
    return Workload("custom", arguments.input_len, arguments.output_len, arguments.num_requests)


@contextmanager
def open_engine(arguments: argparse.Namespace) -> Iterator[Engine]:
    """The engine that the command line asks for; shapes by name become a folder with nothing but a configuration."""
    options: dict[str, Any] = BENCH_DEFAULTS | chosen(arguments, EngineConfig)
    with tempfile.TemporaryDirectory() as folder:
        model = options["model"]
        if options.get("load_format") == "dummy" and model in SHAPES:
            options["model"] = str(write_shape(model, Path(folder)))
        with Engine(**options) as engine:
            yield engine


def report(
    arguments: argparse.Namespace, engine: Engine, workload: Workload, figures: dict[str, Any], lines: list[str]
) -> None:
    """Print JSON or text."""
    if not arguments.json:
        runs = "1 run" if arguments.repeat == 1 else f"{arguments.repeat} runs"
        print(f"{engine.info.model_name} on {engine.info.backend}: {workload.describe()}, {runs}")
        print("\n".join(lines))
        return
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
        "model": engine.info.model_name,
        "backend": engine.info.backend,
        "load_format": engine.config.load_format,
        "workload": asdict(workload),
        "repeat": arguments.repeat,
    }
    plain = {name: asdict(f) if isinstance(f, Figure) else f for name, f in figures.items()}
    print(json.dumps(about | plain, indent=2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
