"""The engine of a benchmark: its options, and shapes by name."""

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
from cupy_engine.model_source import list_models, resolve_model
from cupy_engine.tokenizer import load_tokenizer

from .workloads import SHAPES, write_shape

BENCH_DEFAULTS = {"enable_prefix_caching": False, "seed": 0}


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


@contextmanager
def engine_options(
    arguments: argparse.Namespace, defaults: dict[str, Any] = BENCH_DEFAULTS
) -> Iterator[dict[str, Any]]:
    """The engine's options that the command line asks for.

    A shape by name becomes a folder with nothing but a configuration, which lives as long as the context.

    Raises:
        ConfigError: a shape by name, but weights are wanted.
    """
    options: dict[str, Any] = defaults | chosen(arguments, EngineConfig)
    with tempfile.TemporaryDirectory() as folder:
        model = options["model"]
        if model in SHAPES and options.get("load_format") == "dummy":
            options["model"] = str(write_shape(model, Path(folder), _vocab_size(options.get("tokenizer"))))
        elif model in SHAPES and not Path(model).exists() and all(model != each.name for each in list_models()):
            raise ConfigError("model", f"{model!r} is a shape without weights: give --load-format dummy, too")
        yield options


def check_room(engine: Engine, input_len: int, output_len: int) -> None:
    """Raises ConfigError for requests that would end before they have all their tokens."""
    limit = engine.info.max_model_len
    if input_len + output_len > limit:
        raise ConfigError(
            "output_len",
            f"{output_len} tokens after a prompt of {input_len} are more than the {limit} that a request may have",
        )


def _vocab_size(tokenizer: str | None) -> int | None:
    found = load_tokenizer(resolve_model(tokenizer)) if tokenizer else None
    return found.vocab_size if found else None
