"""The command ``cupy-engine``, from its start to its exit status."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from cupy_engine.errors import EngineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 it failed, 2 it was misused, 130 interrupted."""
    start_s = time.monotonic()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no such character shows a question mark
    try:
        return _run(arguments, start_s)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(arguments: Sequence[str] | None, start_s: float) -> int:
    """A benchmark's own options are parsed by the benchmark."""
    from .commands import build_parser  # here, so that Ctrl-C ends the command in its own way from the first import on

    parsed, rest = build_parser().parse_known_args(arguments)
    if rest and not hasattr(parsed, "benchmark"):
        parsed.misused(f"unrecognized arguments: {' '.join(rest)}")
    parsed.start_s, parsed.rest = start_s, rest
    module, _, function = parsed.run.partition(":")
    return int(getattr(import_module(module, __package__), function)(parsed))


if __name__ == "__main__":
    sys.exit(main())
