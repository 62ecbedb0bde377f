"""Time to the first token, and time of a decode step.

TTFT is the wall time of ``generate`` for one token per request; a decode step is the time from the last request's first
token to its last one, divided by the tokens in between.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from cupy_engine import Engine
from cupy_engine.outputs import RequestOutput

from .op_clock import OpClock
from .setup import Figure, add_common_arguments, chosen_workload, open_engine, report
from .workloads import Workload

_WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench latency``."""
    add_common_arguments(parser, count="batch-size", default_requests=1)
    parser.add_argument(
        "--host-overhead",
        action="store_true",
        help="also measure the part of a decode step outside the ops (NumPy backend)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    workload = chosen_workload(arguments)
    clock = OpClock.installed() if arguments.host_overhead else None
    with open_engine(arguments) as engine:
        figures, lines = _measure(engine, workload, arguments.repeat, clock)
        report(arguments, engine, workload, figures, lines)
    return 0


def _measure(
    engine: Engine, workload: Workload, repeat: int, clock: OpClock | None
) -> tuple[dict[str, Any], list[str]]:
    rng = np.random.default_rng(0)
    _generate(engine, workload, rng, min(_WARM_UP_TOKENS, workload.output_len))
    ttft = Figure.of([_generate(engine, workload, rng, 1)[0] for _ in range(repeat)])
    figures: dict[str, Any] = {"ttft_s": ttft}
    lines = [ttft.scaled(1e3).line("TTFT", "ms")]
    if workload.output_len == 1:
        return figures, lines

    steps, overheads = [], []
    for _ in range(repeat):
        outputs = _generate(engine, workload, rng, workload.output_len)[1]
        start_s, end_s = _decode_span(outputs)
        steps.append((end_s - start_s) / (workload.output_len - 1))
        if clock is not None:
            overheads.append(1.0 - clock.seconds_between(start_s, end_s) / (end_s - start_s))
    figures["decode_step_s"] = Figure.of(steps)
    figures["decode_tokens_per_s"] = Figure.of([workload.num_requests / step for step in steps])
    lines.append(figures["decode_step_s"].scaled(1e3).line("decode step", "ms"))
    lines.append(figures["decode_tokens_per_s"].line("decode", "tokens/s"))
    if overheads:
        figures["host_overhead"] = Figure.of(overheads)
        lines.append(figures["host_overhead"].scaled(1e2).line("outside the ops", "%"))
    return figures, lines


def _generate(
    engine: Engine, workload: Workload, rng: np.random.Generator, output_len: int
) -> tuple[float, list[RequestOutput]]:
    # Wall seconds, outputs
    prompts = workload.prompts(engine.frontend.vocab_size, rng)
    start_s = time.monotonic()
    outputs = engine.generate(prompts, workload.sampling_params(output_len), progress=False)
    return time.monotonic() - start_s, outputs


def _decode_span(outputs: list[RequestOutput]) -> tuple[float, float]:
    firsts = [output.metrics.first_token_time_s or 0.0 for output in outputs]
    ends = [output.metrics.finish_time_s or 0.0 for output in outputs]
    return max(firsts), max(ends)


if __name__ == "__main__":
    own_parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(own_parser)
    sys.exit(run(own_parser.parse_args()))
