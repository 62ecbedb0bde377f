"""Where a model's tensors come from: the protocol that models load through, and random weights for benchmarks."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from cupy_engine.device import Array, Device
from cupy_engine.errors import ModelLoadError
from cupy_engine.model_config import ModelConfig


class WeightSource(Protocol):
    """Tensors by their Hugging Face names. Used by one thread at a time."""

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor ``name``, which must have exactly ``shape``; dtype float32, float16 or bfloat16, as stored.

        The array may be a read-only, non-contiguous view of a mapped file or of memory that others share; it may be on
        the device already.

        Raises:
            ModelLoadError: no such tensor, or of another shape or an unreadable type; names file and tensor.
        """

    def has(self, name: str) -> bool: ...

    @property
    def num_bytes(self) -> int:
        """Of all tensors, as :meth:`take` gives them; 0 if nothing is read."""

    def unused(self) -> list[str]:
        """Names of the tensors that nobody took, in file order."""

    def close(self) -> None:
        """Release threads and files. Arrays taken stay valid."""


def check_shape(actual: tuple[int, ...], expected: tuple[int, ...], file: Path, name: str) -> None:
    """Raise ModelLoadError unless a stored tensor has the shape that the model needs."""
    if actual != expected:
        raise ModelLoadError(f"has shape {actual}, the model needs {expected}", file=file, tensor=name)


def as_dtype(dtype: Any) -> np.dtype[Any]:
    """A NumPy dtype from a dtype or a name, ``bfloat16`` included."""
    resolved: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return resolved


class DummyWeights:
    """Random weights of any shape: normal with standard deviation 0.02, norm weights around 1.

    Nothing of a model's size is ever made: one buffer of 4 Mi random numbers serves every tensor, whose rows are
    windows into it, some numbers apart. Where the first begins depends on the name. Equal seeds give equal weights.

    Args:
        device: where matrices are made; default: on the host.
    """

    num_bytes = 0
    _BUFFER_ITEMS = 1 << 22
    _STD = 0.02

    def __init__(
        self, config: ModelConfig, *, seed: int = 0, dtype: Any = "float32", device: Device | None = None
    ) -> None:
        random = np.random.default_rng(seed).standard_normal(self._BUFFER_ITEMS, np.float32)
        self._buffer = (random * np.float32(self._STD)).astype(as_dtype(dtype))
        self._on_device: Array = self._buffer if device is None else device.asarray(self._buffer)
        self._xp: Any = np if device is None else device.xp
        self._buffer.flags.writeable = False
        self._absent = absent_in(config)

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        key = zlib.crc32(name.encode())
        if re.search(r"(norm|ln_\w+)\.weight$", name):
            return self._windows(np, self._buffer, key, shape) + np.ones((), self._buffer.dtype)
        return self._windows(self._xp, self._on_device, key, shape)

    def has(self, name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in self._absent)

    def unused(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing to release."""

    def _windows(self, xp: Any, buffer: Array, key: int, shape: tuple[int, ...]) -> Array:
        num_rows, row_items = math.prod(shape[:-1]), shape[-1]
        stride = (buffer.size // 2 - row_items) // num_rows
        if stride < 1:
            return np.resize(self._buffer, shape)
        start = key % (buffer.size // 2)
        row_strides = [stride * math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 1)]
        strides = [items * buffer.itemsize for items in (*row_strides, 1)]
        return xp.lib.stride_tricks.as_strided(buffer[start:], shape, strides)


def absent_in(config: ModelConfig) -> list[str]:
    """Patterns of the tensors that the configuration rules out."""
    absent = {
        r"^lm_head\.": config.tie_word_embeddings,
        r"\b[qkvo]_proj\.bias$": not config.attention_bias,
        r"\b(gate|up|down)_proj\.bias$": not config.mlp_bias,
    }
    return [pattern for pattern, is_absent in absent.items() if is_absent]
