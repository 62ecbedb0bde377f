"""Where a model's tensors come from: the protocol that models load through, and random weights for benchmarks."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from cupy_engine.errors import ModelLoadError
from cupy_engine.model_config import ModelConfig


class WeightSource(Protocol):
    """Tensors by their Hugging Face names. Used by one thread at a time."""

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor ``name``, which must have exactly ``shape``; dtype float32, float16 or bfloat16, as stored.

        The array may be a read-only, non-contiguous view of a mapped file or of memory that others share.

        Raises:
            ModelLoadError: no such tensor, or of another shape or an unreadable type; names file and tensor.
        """

    def has(self, name: str) -> bool: ...

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
    """

    _BUFFER_ITEMS = 1 << 22
    _STD = 0.02

    def __init__(self, config: ModelConfig, *, seed: int = 0, dtype: Any = "float32") -> None:
        random = np.random.default_rng(seed).standard_normal(self._BUFFER_ITEMS, np.float32)
        self._buffer = (random * np.float32(self._STD)).astype(as_dtype(dtype))
        self._buffer.flags.writeable = False
        self._absent = _absent_in(config)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._windows(zlib.crc32(name.encode()), shape)
        is_norm = re.search(r"(norm|ln_\w+)\.weight$", name) is not None
        return (array + np.ones((), array.dtype)) if is_norm else array

    def has(self, name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in self._absent)

    def unused(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing to release."""

    def _windows(self, key: int, shape: tuple[int, ...]) -> np.ndarray:
        num_rows, row_items = math.prod(shape[:-1]), shape[-1]
        stride = (self._buffer.size // 2 - row_items) // num_rows
        if stride < 1:
            return np.resize(self._buffer, shape)
        start = key % (self._buffer.size // 2)
        row_strides = [stride * math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 1)]
        strides = [items * self._buffer.itemsize for items in (*row_strides, 1)]
        return np.lib.stride_tricks.as_strided(self._buffer[start:], shape, strides, writeable=False)


def _absent_in(config: ModelConfig) -> list[str]:
    """Patterns of the tensors that the configuration rules out."""
    absent = {
        r"^lm_head\.": config.tie_word_embeddings,
        r"\b[qkvo]_proj\.bias$": not config.attention_bias,
        r"\b(gate|up|down)_proj\.bias$": not config.mlp_bias,
    }
    return [pattern for pattern, is_absent in absent.items() if is_absent]
