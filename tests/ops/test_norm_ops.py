"""Normalizations against float64, on ragged sizes and all dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

SHAPES = [(1, 64), (3, 576), (7, 129), (40, 33)]
TOLERANCE: dict[Any, float] = {np.float32: 2e-6, np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2}
EPS = 1e-5


def arrays(shape: tuple[int, int], dtype: Any) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(sum(shape))
    x, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    weight, bias = (rng.standard_normal(shape[1]).astype(dtype) for _ in range(2))
    return x, residual, weight, bias


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide * weight.astype(np.float64) / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + EPS)


def layer(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(axis=1, keepdims=True) + EPS)
    return (wide - wide.mean(axis=1, keepdims=True)) / deviation * weight.astype(np.float64) + bias.astype(np.float64)


def check(result: np.ndarray, expected: np.ndarray, dtype: Any) -> None:
    assert result.dtype == dtype
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result.astype(np.float64), expected, atol=TOLERANCE[dtype] * scale, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, int], dtype: Any) -> None:
    x, _, weight, bias = arrays(shape, dtype)
    before = x.copy()
    check(rms_norm(x, weight, EPS), rms(x, weight), dtype)
    check(layer_norm(x, weight, bias, EPS), layer(x, weight, bias), dtype)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_updated_in_place(shape: tuple[int, int], dtype: Any) -> None:
    x, residual, weight, bias = arrays(shape, dtype)
    total = x + residual
    for_layer = residual.copy()
    check(add_rms_norm(x, residual, weight, EPS), rms(total, weight), dtype)
    assert np.array_equal(residual, total)
    check(add_layer_norm(x, for_layer, weight, bias, EPS), layer(total, weight, bias), dtype)
    assert np.array_equal(for_layer, total)


def test_out_may_be_the_input() -> None:
    x, residual, weight, bias = arrays((5, 48), np.float32)
    expected = rms(x, weight)
    assert rms_norm(x, weight, EPS, out=x) is x
    check(x, expected, np.float32)
    expected = layer(x + residual, weight, bias)
    assert add_layer_norm(x, residual, weight, bias, EPS, out=x) is x
    check(x, expected, np.float32)


def test_column_major_input() -> None:
    x, residual, weight, _ = arrays((6, 80), np.float32)
    expected = rms(x + residual, weight)
    check(add_rms_norm(np.asfortranarray(x), residual, weight, EPS), expected, np.float32)
