"""A steady step is enqueued while the GPU is busy: it allocates nothing, compiles nothing and waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from golden_data import tiny_model

from cupy_engine import Engine, SamplingParams
from cupy_engine.cuda_backend import CudaBackend
from cupy_engine.executor import Executor, StepHandle
from cupy_engine.plan import StepPlan

pytestmark = pytest.mark.gpu

BUSY_S = 0.1
NUM_GRAPH_TOKENS = 32
SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < nanoseconds);
}
"""


@dataclass
class Observed:
    """What enqueuing a step did."""

    plan: StepPlan
    num_pool_allocations: int
    num_driver_allocations: int
    was_busy: bool  # the GPU, with what came before the step, when it was enqueued
    duration_s: float

    @property
    def is_decode(self) -> bool:
        return all(s.num_tokens == 1 for s in self.plan.sequences)


class WatchedExecutor:
    """Keeps the GPU busy for ``BUSY_S`` before each step, so that waiting for it shows."""

    def __init__(self, inner: Executor, device: Any) -> None:
        import cupy

        self._inner = inner
        self._device = device
        self._spin = cupy.RawKernel(SPIN, "spin")
        with device.use():
            self._spin((1,), (1,), (0,))
        self.observed: list[Observed] = []

    def submit(self, plan: StepPlan) -> StepHandle:
        import cupy

        class Allocations(cupy.cuda.MemoryHook):  # type: ignore[misc]
            name = "allocations"
            num_pool = num_driver = 0

            def malloc_preprocess(self, **_: Any) -> None:
                self.num_pool += 1

            def alloc_preprocess(self, **_: Any) -> None:
                self.num_driver += 1

        done = cupy.cuda.Event(disable_timing=True)
        with self._device.use():
            self._spin((1,), (1,), (int(BUSY_S * 1e9),))
            done.record(self._device.stream)
        start_s = time.perf_counter()
        with Allocations() as hook:
            handle = self._inner.submit(plan)
        duration_s = time.perf_counter() - start_s
        self.observed.append(Observed(plan, hook.num_pool, hook.num_driver, not done.done, duration_s))
        return handle


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, params: SamplingParams) -> Iterator[tuple[Engine, WatchedExecutor]]:
    """An engine that has run the requests of :func:`requests` twice, and may compile nothing any more."""
    import cupy

    options = {"max_num_seqs": 8, "num_kv_blocks": 200, "swap_space_bytes": 0, "enable_prefix_caching": False}
    options |= {"device": "cuda", "dtype": "bfloat16"}
    monkeypatch.setattr(CudaBackend, "max_num_mixed_tokens", NUM_GRAPH_TOKENS)
    with Engine(model=str(tiny_model("llama")), **options) as engine:
        for _ in range(2):
            engine.generate(requests(), params)
        core = engine._core
        core._executor = executor = WatchedExecutor(core._executor, core._executor._device)  # type: ignore[attr-defined]

        def compiled(*_: Any, **__: Any) -> Any:
            raise AssertionError("a steady step compiles")

        monkeypatch.setattr(cupy, "RawModule", compiled)
        monkeypatch.setattr(cupy.cuda.compiler, "_compile_module_with_cache", compiled)
        yield engine, executor


def requests() -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(range(1 + i, 51 + i))} for i in range(8)]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.1, max_tokens=12, ignore_eos=True),
    ],
    ids=["greedy", "sampled"],
)
def test_steps(monkeypatch: pytest.MonkeyPatch, params: SamplingParams) -> None:
    with watched(monkeypatch, params) as (engine, executor):
        expected = engine.generate(requests(), params) if params.temperature == 0.0 else None
        executor.observed.clear()
        outputs = engine.generate(requests(), params)
        assert all(len(output.token_ids) == 12 for output in outputs)
        assert expected is None or [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    decodes = [step for step in executor.observed if step.is_decode]
    eager = [step for step in executor.observed if step.plan.num_tokens > NUM_GRAPH_TOKENS]
    assert len(decodes) >= 5
    assert eager
    for step in executor.observed:
        print(step.plan.num_tokens, step.num_pool_allocations, step.num_driver_allocations, f"{step.duration_s:.4f} s")
        assert step.was_busy
        assert step.duration_s < BUSY_S / 2
        assert step.num_driver_allocations == 0
    for step in decodes:
        assert step.num_pool_allocations == 0 or step.plan.slot_setups
