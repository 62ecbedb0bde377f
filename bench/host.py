"""A server's engine at work on the steps between its GPU's: a real core, but a worker that only packs its plans.

All that this leaves out of the host's work are copies, launches and sockets; ``bench throughput --gpu-busy`` has them,
but for the sockets. Besides the three parts, the work is to sort and encode the outputs for four HTTP workers.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from cupy_engine.server.cli import main
from cupy_engine.server.engine_socket import by_worker
from cupy_engine.server.wire import encode, request_id
from tqdm import trange

from cupy_engine.block_manager import BlockManager
from cupy_engine.core import CoreInfo, EngineCore
from cupy_engine.executor import DoneStep, StepHandle
from cupy_engine.guides import Guides
from cupy_engine.messages import GenerateRequest
from cupy_engine.metrics import EngineMetrics
from cupy_engine.overload import AdmissionRule
from cupy_engine.plan import StepPlan, StepResult
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request_queue import FcfsPolicy
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.scheduler import Scheduler
from cupy_engine.slot_table import SlotTable
from cupy_engine.step_buffers import StepArrays, StepShape, num_ints

from .host_clock import HostClock
from .option_types import count
from .report import Figure, Figures, Report, Row, add_output_arguments, check_output, emit

BLOCK_SIZE = 16
VOCAB_SIZE = 128_256
EOS = 128_001


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench host``."""
    parser.add_argument("--batch-size", type=count, default=256, help="sequences that run at once (default: 256)")
    parser.add_argument("--input-len", type=count, default=128, help="prompt tokens, on average (default: 128)")
    parser.add_argument("--output-len", type=count, default=256, help="tokens to generate (default: 256)")
    parser.add_argument("--repeat", type=count, default=5, help="measured runs, after one to warm up (default: 5)")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    check_output(arguments)
    lengths = arguments.batch_size, arguments.input_len, arguments.output_len
    rows = [_row(lengths, arguments.repeat, caches_prefixes=caches) for caches in (False, True)]
    about = {name: getattr(arguments, name) for name in ("batch_size", "input_len", "output_len", "repeat")}
    title = "{} sequences, about {} → {}: CPU time of a decode step".format(*lengths)
    emit(Report(title, about, rows), arguments)
    return 0


def _row(lengths: tuple[int, int, int], repeat: int, *, caches_prefixes: bool) -> Row:
    name = "prefix cache" if caches_prefixes else "no prefix cache"
    progress = trange(1 + repeat, desc=name, unit="run", disable=None)
    runs = [_measure(*lengths, caches_prefixes=caches_prefixes) for _ in progress][1:]
    return Row(name, {key: Figure.of([float(run[key]) for run in runs]) for key in runs[0]})  # type: ignore[arg-type]


def _measure(batch_size: int, input_len: int, output_len: int, *, caches_prefixes: bool) -> Figures:
    max_len = 2 * input_len + output_len
    core = _core(batch_size, max_len, caches_prefixes)
    for request in _requests(batch_size, input_len, output_len):
        core.add(request)
    with _frozen_heap(), HostClock.watching(core) as clock:
        num_tokens = 0
        while core.has_work:
            outputs = core.step()
            num_tokens += len(outputs)
            for mail in by_worker(outputs).values():
                encode(mail)
    assert num_tokens == batch_size * output_len
    return clock.figures()


def _core(batch_size: int, max_len: int, caches_prefixes: bool) -> EngineCore:
    blocks_each = -(-max_len // BLOCK_SIZE)
    manager = BlockManager(batch_size * blocks_each, BLOCK_SIZE, 0, caches_prefixes)
    metrics = EngineMetrics()
    scheduler = Scheduler(
        manager,
        FcfsPolicy(),
        PreemptionCosts("recompute", 1, 1.0),
        max_num_seqs=batch_size,
        max_num_batched_tokens=8192,
        max_model_len=max_len,
        eos_token_ids=(EOS,),
        seed=0,
        listener=metrics,
    )
    info = CoreInfo("none", "none", max_len, manager.num_blocks, BLOCK_SIZE, 0, 0, 0.0)
    guides = Guides(lambda: None, VOCAB_SIZE)  # type: ignore[arg-type, return-value]
    executor = _PackingExecutor(batch_size, blocks_each)
    return EngineCore(
        scheduler, executor, metrics, info, guides, AdmissionRule(batch_size, None), max_steps_in_flight=2
    )


def _requests(batch_size: int, input_len: int, output_len: int) -> Iterator[GenerateRequest]:
    """Prompts of half to one and a half times the length: blocks fill up at different steps, as they do in a server."""
    rng = np.random.default_rng(0)
    for i, length in enumerate(rng.integers(-(-input_len // 2), input_len + input_len // 2, batch_size, endpoint=True)):
        prompt = rng.integers(0, VOCAB_SIZE, length).tolist()
        params = SamplingParams(max_tokens=output_len, seed=i)
        yield GenerateRequest(request_id=request_id(i % 4, i), prompt_token_ids=prompt, params=params)


@contextmanager
def _frozen_heap() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _PackingExecutor:
    """Lays every step out as for a GPU, and draws token ids from a list."""

    def __init__(self, num_slots: int, blocks_each: int) -> None:
        self._slots = SlotTable(num_slots, blocks_each, BLOCK_SIZE)
        largest = StepShape(8192, num_slots, blocks_each, num_slots, num_slots)
        self._memory = np.empty(num_ints(largest), np.int32)
        self._token_ids = np.random.default_rng(1).integers(0, EOS, 1009).tolist()

    def submit(self, plan: StepPlan) -> StepHandle:
        self._slots.write(plan)
        step = self._slots.pack(plan)
        StepArrays.view(self._memory, StepShape.of(step)).fill(step)
        num_draws, first = len(step.draw_slots), plan.step_id % 500
        return DoneStep(StepResult(plan.step_id, self._token_ids[first : first + num_draws]))


if __name__ == "__main__":
    sys.exit(main(["bench", "host", *sys.argv[1:]]))
