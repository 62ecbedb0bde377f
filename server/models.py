"""``cupy-engine models``: what there is to run."""

from __future__ import annotations

import sys
from argparse import Namespace

import msgspec

from cupy_engine.model_registry import known_architectures
from cupy_engine.model_source import DEFAULT_MODEL, list_models


def models(arguments: Namespace) -> int:
    """The command; its exit status."""
    built_in, architectures = list_models(), known_architectures()
    if arguments.json:
        found = {
            "built_in": [
                {
                    "name": model.name,
                    "is_default": model.name == DEFAULT_MODEL,
                    "num_bytes": model.num_bytes,
                    "is_cached": model.is_cached,
                    "path": str(model.path),
                    "origin": model.origin,
                }
                for model in built_in
            ],
            "architectures": architectures,
        }
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        return 0
    sys.stdout.write("built in:\n")
    for model in built_in:
        state = f"cached at {model.path}" if model.is_cached else f"fetched at first use from {model.origin}"
        default = " (default)" if model.name == DEFAULT_MODEL else ""
        sys.stdout.write(f"  {model.name}{default}  {model.num_bytes / 1e6:.0f} MB, {state}\n")
    sys.stdout.write(
        "also a Hugging Face folder, a .gguf file or a hub id (organization/name) of these architectures:\n"
    )
    sys.stdout.write("".join(f"  {name}\n" for name in architectures))
    return 0
