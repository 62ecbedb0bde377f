"""Sampling beside the time it takes to read the logits once: what bench/kernels.py measures as ``sampling``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from cupy_engine.cuda_device import CudaDevice
from cupy_engine.cuda_sampler import CudaSampler
from cupy_engine.device import Array
from cupy_engine.plan import SlotSetup
from cupy_engine.sampling_params import SamplingParams

_VOCAB_SIZE = 128256
_ROTATED_BYTES = 256 << 20
_DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "float": np.float32}
_SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.1": {"min_p": 0.1},
    "top-k 20, top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "penalties": {"temperature": 0.0, "frequency_penalty": 0.5},
}


def sampling_calls() -> Iterator[tuple[str, str, list[Callable[[], Any]], float]]:
    """Name, case, launches and the bytes of the logits; random logits of standard deviation 3, a hard case for cuts."""
    for num_draws in (1, 32, 256):
        for type_name, dtype in _DTYPES.items():
            rows = [_logits(num_draws, dtype) for _ in range(max(2, _ROTATED_BYTES // _num_bytes(num_draws, dtype)))]
            for settings_name, settings in _SETTINGS.items():
                sampler, integers = _seated(num_draws, settings)
                case = f"{num_draws} x {_VOCAB_SIZE} {type_name}, {settings_name}"
                launches: list[Callable[[], Any]] = [partial(sampler.sample, logits, *integers) for logits in rows]
                yield "sample", case, launches, _num_bytes(num_draws, dtype)
            yield "token_logprobs", f"{num_draws} x {_VOCAB_SIZE} {type_name}, 20", *_logprobs(rows, num_draws, dtype)


def _num_bytes(num_draws: int, dtype: Any) -> int:
    return num_draws * _VOCAB_SIZE * int(np.dtype(dtype).itemsize)


def _logits(num_draws: int, dtype: Any) -> Array:
    import cupy

    noise = np.random.default_rng().standard_normal(1 << 20, np.float32) * 3
    return cupy.asarray(np.resize(noise, num_draws * _VOCAB_SIZE).reshape(num_draws, -1).astype(dtype))


def _seated(num_draws: int, settings: dict[str, Any]) -> tuple[CudaSampler, list[Array]]:
    """A sampler with every slot seated; rows, slots, positions and where the tokens go."""
    import cupy

    device = CudaDevice()
    sampler = CudaSampler(num_draws, _VOCAB_SIZE, device)
    for slot in range(num_draws):
        sampler.set_slot(SlotSetup(slot, SamplingParams(**settings), slot, [1, 2, 3], 3, [0], [], False))
    sampler.flush(device.stream)
    device.stream.synchronize()
    order = cupy.arange(num_draws, dtype=np.int32)
    return sampler, [order, order, cupy.full(num_draws, 3, np.int32), cupy.empty(num_draws, np.int32)]


def _logprobs(rows: list[Array], num_draws: int, dtype: Any) -> tuple[list[Callable[[], Any]], float]:
    import cupy

    sampler, (order, *_) = _seated(num_draws, {})
    shape = (num_draws, 21)
    outputs = cupy.empty(shape, np.int32), cupy.empty(shape, np.float32), cupy.empty(num_draws, np.int32)
    return [partial(sampler.logprobs, logits, order, order, 20, *outputs) for logits in rows], _num_bytes(
        num_draws, dtype
    )
