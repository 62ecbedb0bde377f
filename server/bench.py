"""``cupy-engine bench``: hands over to the benchmarks."""

from __future__ import annotations

import argparse
from importlib import import_module

_MODULES = {"serve": "end_to_end", "memory": "memory_usage"}


def bench(arguments: argparse.Namespace) -> int:
    """Parse the benchmark's own options and run it; the exit status."""
    name = _MODULES.get(arguments.benchmark, arguments.benchmark)
    module = import_module(f"cupy_engine.bench.{name}")
    parser = argparse.ArgumentParser(
        prog=f"cupy-engine bench {arguments.benchmark}",
        usage="%(prog)s [options]",
        description=module.__doc__,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(arguments.rest)))
