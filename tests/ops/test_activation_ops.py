"""Activations against the math library in float64, by the names that configurations use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_engine.errors import ConfigError
from cupy_engine.ops.activation import ACTIVATIONS, GATED_ACTIVATIONS, activation, gated_activation


def gelu(v: float) -> float:
    return 0.5 * v * math.erfc(-v / math.sqrt(2))


def gelu_tanh(v: float) -> float:
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def silu(v: float) -> float:
    return v / (1 + math.exp(-v))


EXACT: dict[str, Callable[[float], float]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
}
TOLERANCE: dict[Any, float] = {np.float32: 1e-6, np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2}


def exact(name: str, x: np.ndarray) -> np.ndarray:
    return np.vectorize(EXACT[name], otypes=[np.float64])(x.astype(np.float64))


def test_every_name_is_checked() -> None:
    assert set(EXACT) == set(ACTIVATIONS)
    assert set(GATED_ACTIVATIONS) <= set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", EXACT)
def test_elementwise(name: str, dtype: Any) -> None:
    x = (np.random.default_rng(1).standard_normal((7, 131)) * 4).astype(dtype)
    result = activation(name)(x)
    assert result.dtype == dtype
    np.testing.assert_allclose(
        result.astype(np.float64), exact(name, x), atol=TOLERANCE[dtype] * 2, rtol=TOLERANCE[dtype] * 2
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", GATED_ACTIVATIONS)
def test_gated(name: str, dtype: Any) -> None:
    gate_up = np.random.default_rng(2).standard_normal((5, 2 * 77)).astype(dtype)
    gate, up = np.split(gate_up, 2, axis=1)
    expected = exact(name, gate) * up.astype(np.float64)
    for layout in (gate_up, np.asfortranarray(gate_up)):
        result = gated_activation(name)(layout)
        assert result.shape == (5, 77)
        assert result.dtype == dtype
        np.testing.assert_allclose(result.astype(np.float64), expected, atol=TOLERANCE[dtype] * 4, rtol=0)
    out = np.full((5, 77), np.nan, np.float32).astype(dtype)
    assert gated_activation(name)(gate_up, out) is out
    np.testing.assert_array_equal(out, gated_activation(name)(gate_up))


@pytest.mark.parametrize("name", EXACT)
def test_extremes_are_finite_limits(name: str) -> None:
    low, high = activation(name)(np.array([-1e4, 1e4], np.float32))
    assert abs(low) < 1e-30
    assert high == exact(name, np.array([1e4]))[0]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'softsign'.*silu.*relu"):
        activation("softsign")
    with pytest.raises(ConfigError, match=r"'relu'.*silu"):
        gated_activation("relu")
