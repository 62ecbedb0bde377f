"""A model without its weights: how large they are, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupy_engine.device import NumpyDevice
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_registry import model_class
from cupy_engine.weights import DummyWeights, absent_in, as_dtype


def weight_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of the model's weights in ``dtype``.

    Raises:
        ModelLoadError: the architecture is unknown.
    """
    model = model_class(config.architecture)(config, _HollowWeights(config), _HollowDevice(), as_dtype(dtype))
    return model.weights.num_bytes


def _hollow(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros of any shape that all lie in one place."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class _HollowWeights(DummyWeights):
    """Any tensor, without memory."""

    def __init__(self, config: ModelConfig) -> None:
        self._absent = absent_in(config)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return _hollow(shape, np.float32)


class _HollowDevice(NumpyDevice):
    """Keeps shapes and dtypes of weights, not their elements."""

    def __init__(self) -> None:
        """Nothing is computed here, so the C library needs no tuning."""

    def stack(self, parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        return _hollow((sum(map(len, parts)), *parts[0].shape[1:]), dtype)
