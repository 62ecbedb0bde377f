"""``cupy-engine bench``: hands over to the benchmarks."""

from __future__ import annotations

import argparse
from importlib import import_module


def bench(arguments: argparse.Namespace) -> int:
    """Parse the benchmark's own options and run it; the exit status."""
    module = import_module(f"cupy_engine.bench.{arguments.benchmark}")
    parser = argparse.ArgumentParser(prog=f"cupy-engine bench {arguments.benchmark}", description=module.__doc__)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(arguments.rest)))
