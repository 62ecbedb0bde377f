"""Swapping on the GPU: page-locked memory, copies that nobody waits for, and outputs that do not change."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden_data import tiny_model
from test_gpu_steady_steps import BUSY_S, SPIN

from cupy_engine import Engine, SamplingParams
from cupy_engine.cuda_device import CudaDevice
from cupy_engine.hf_config import load_hf_config
from cupy_engine.kv_cache import KVCache

pytestmark = pytest.mark.gpu

MODEL = tiny_model("llama")
CASES: list[dict[str, Any]] = json.loads((MODEL / "expected.json").read_text())
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
PINNED = 1  # cudaMemoryTypeHost


def test_copies_are_enqueued_from_and_to_pinned_memory() -> None:
    import cupy

    device = CudaDevice()
    with device.use():
        cache = KVCache(load_hf_config(MODEL), 8, 16, 8, device, np.float32)
        assert cupy.cuda.runtime.pointerGetAttributes(cache._host_blocks.ctypes.data).type == PINNED
        cache._blocks[...] = cupy.random.random_sample(cache._blocks.shape, dtype=np.float32)
        before = cache._blocks.get()
        spin, busy = cupy.RawKernel(SPIN, "spin"), cupy.cuda.Event(disable_timing=True)
        for spin_s in (0.0, BUSY_S):  # the first time everything compiles
            cache._blocks[...] = cupy.asarray(before)
            device.stream.synchronize()
            spin((1,), (1,), (int(spin_s * 1e9),))
            busy.record(device.stream)
            cache.swap_out([(1, 5), (4, 0)])
            cache._blocks[:, :, 1] = np.nan
            cache._blocks[:, :, 4] = np.nan
            cache.swap_in([(5, 2), (0, 3)])
            cache.copy_blocks([(2, 6)])
        assert not busy.done
        after = cache._blocks.get()
    np.testing.assert_array_equal(after[:, :, [2, 3, 6]], before[:, :, [1, 4, 1]])
    np.testing.assert_array_equal(after[:, :, [0, 5, 7]], before[:, :, [0, 5, 7]])
    assert np.isnan(after[:, :, [1, 4]]).all()


def test_sequences_are_swapped_and_come_back() -> None:
    """Fewer blocks than the sequences need together; nothing is ever computed again."""
    options = {"num_kv_blocks": 12, "max_num_seqs": 8, "enable_prefix_caching": False}
    options |= {"admission_mode": "greedy", "preemption_mode": "swap"}
    cases = [case for case in CASES if len(case["prompt_token_ids"]) < 100] * 4
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in cases]
    with Engine(model=str(MODEL), device="cuda", dtype="float32", swap_space_bytes=1 << 24, **options) as engine:
        swapped: list[int] = []
        executor = engine._core._executor
        submit = executor.submit

        def watching(plan: Any) -> Any:
            swapped.append(len(plan.swap_out))
            return submit(plan)

        executor.submit = watching  # type: ignore[method-assign]
        outputs = engine.generate(prompts, GREEDY)
        stats = engine.stats()
    assert sum(swapped) > 0
    assert [output.token_ids for output in outputs] == [case["greedy_token_ids"] for case in cases]
    assert stats.num_free_kv_blocks == stats.num_kv_blocks == 12


def test_a_step_that_memory_does_not_hold_is_computed_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    """All but some memory of the engine's pool is taken away while it runs."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, prompt_logprobs=1)
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
    options = {"num_kv_blocks": 100, "swap_space_bytes": 0, "max_num_seqs": 8, "enable_prefix_caching": False}
    with Engine(model=str(MODEL), device="cuda", dtype="float32", **options) as engine:
        expected = engine.generate(prompts, params)
        device = engine._core._executor._device  # type: ignore[attr-defined]
        hoard = take_all(device, leave_bytes=64 << 10)
        outputs = engine.generate(prompts, params)
        hoard.clear()
    assert "no memory for" in caplog.text
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert [output.token_ids for output in outputs] == [case["greedy_token_ids"] for case in CASES]


def take_all(device: CudaDevice, leave_bytes: int) -> list[Any]:
    """Arrays that leave the device's pools only so much."""
    hoard: list[Any] = []
    with device.use():
        device.limit_growth(1 << 20)
        for size in (1 << 26, 3 << 20, 1 << 20, 1 << 15, 1 << 9):
            try:
                while True:
                    hoard.append(device.empty((size,), np.uint8))
            except MemoryError:
                continue
        while leave_bytes > 0:
            leave_bytes -= hoard.pop().nbytes
    return hoard
