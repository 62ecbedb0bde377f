"""What the benchmarks have in common: their options, the workload and the engine."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cupy_engine.server.options import add_options, chosen

from cupy_engine import Engine
from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError
from cupy_engine.model_source import resolve_model
from cupy_engine.tokenizer import load_tokenizer

from .report import add_output_arguments, check_output
from .workloads import SHAPES, Workload, named_workload, write_shape

BENCH_DEFAULTS = {"enable_prefix_caching": False, "seed": 0}


def add_common_arguments(parser: argparse.ArgumentParser, *, default_requests: int) -> None:
    """Workload, model and output options."""
    what = parser.add_argument_group("workload")
    what.add_argument("--workload", help="ttft-N, lat, dec-B, thr-short or thr-long, instead of the three below")
    what.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    what.add_argument("--output-len", type=int, default=64, help="tokens to generate (default: 64)")
    what.add_argument(
        "--batch-size",
        "--num-requests",
        dest="num_requests",
        type=int,
        default=default_requests,
        help=f"requests, all at once (default: {default_requests})",
    )
    what.add_argument("--repeat", type=int, default=5, help="measured runs, after one to warm up (default: 5)")
    add_engine_arguments(parser)
    add_output_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser, defaults: dict[str, Any] = BENCH_DEFAULTS) -> None:
    """The model and every option of the engine."""
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "-m",
        "--model",
        default="smollm2-135m",
        help=f"built-in name, folder, .gguf file or hub id; with --load-format dummy also {', '.join(SHAPES)}, with "
        "the vocabulary of --tokenizer if one is given (default: smollm2-135m)",
    )
    add_options(engine, EngineConfig, skip=("model",), defaults=defaults)


def chosen_workload(arguments: argparse.Namespace) -> Workload:
    """The workload that the command line asks for.

    Raises:
        ConfigError: an unknown name, or a number below 1.
    """
    check_output(arguments)
    require_positive(arguments, "input_len", "output_len", "num_requests", "repeat")
    if arguments.workload:
        return named_workload(arguments.workload)
    return Workload("custom", arguments.input_len, arguments.output_len, arguments.num_requests)


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ConfigError for a number below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ConfigError(name, f"must be at least 1, got {getattr(arguments, name)}")


def require_percentiles(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for one that is none."""
    for value in arguments.percentiles:
        if not 0 <= value <= 100:
            raise ConfigError("percentiles", f"must be between 0 and 100, got {value:g}")


def num_runs(arguments: argparse.Namespace) -> str:
    return "1 run" if arguments.repeat == 1 else f"{arguments.repeat} runs"


@contextmanager
def engine_options(
    arguments: argparse.Namespace, defaults: dict[str, Any] = BENCH_DEFAULTS
) -> Iterator[dict[str, Any]]:
    """The engine's options that the command line asks for.

    A shape by name becomes a folder with nothing but a configuration, which lives as long as the context.
    """
    options: dict[str, Any] = defaults | chosen(arguments, EngineConfig)
    with tempfile.TemporaryDirectory() as folder:
        model = options["model"]
        if options.get("load_format") == "dummy" and model in SHAPES:
            options["model"] = str(write_shape(model, Path(folder), _vocab_size(options.get("tokenizer"))))
        yield options


def _vocab_size(tokenizer: str | None) -> int | None:
    found = load_tokenizer(resolve_model(tokenizer)) if tokenizer else None
    return found.vocab_size if found else None


@contextmanager
def open_engine(arguments: argparse.Namespace) -> Iterator[Engine]:
    """The engine that the command line asks for."""
    with engine_options(arguments) as options, Engine(**options) as engine:
        yield engine


def describe(engine: Engine) -> dict[str, Any]:
    """What a report says about an engine."""
    return {
        "model": engine.info.model_name,
        "backend": engine.info.backend,
        "load_format": engine.config.load_format,
        "load_time_s": engine.info.load_time_s,
    }
