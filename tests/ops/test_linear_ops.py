"""The matrix product of every path, and embedding lookup."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_engine.ops import _tiled_matmul, _vector_product
from cupy_engine.ops._vector_product import vector_product
from cupy_engine.ops.activation import gated_activation
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.gated_linear import gated_linear
from cupy_engine.ops.linear import linear

TOLERANCE: dict[Any, float] = {np.float32: 1e-5, np.float16: 2e-3, ml_dtypes.bfloat16: 1e-2}


def check(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, tolerance: float) -> None:
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        expected += bias.astype(np.float64)
    result = linear(x, weight, bias)
    assert result.shape == expected.shape
    assert result.dtype == x.dtype
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(result.astype(np.float64), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("has_tiles", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 16, 33, 64, 127, 128, 129, 300])
@pytest.mark.parametrize(("num_outputs", "num_features"), [(960, 576), (613, 1536), (40, 24), (97, 4099)])
def test_rows(
    num_rows: int, num_outputs: int, num_features: int, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiled_matmul, "has_avx512", lambda: has_tiles)
    rng = np.random.default_rng(num_rows)
    x = rng.standard_normal((num_rows, num_features), dtype=np.float32)
    weight = rng.standard_normal((num_outputs, num_features), dtype=np.float32)
    bias = rng.standard_normal(num_outputs, dtype=np.float32)
    check(x, weight, None, TOLERANCE[np.float32])
    check(np.asfortranarray(x), weight, bias, TOLERANCE[np.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    x, weight, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 96), (44, 96), (44,)))
    check(x, weight, bias, TOLERANCE[dtype])


@pytest.mark.parametrize("min_shared_bytes", [0, 1 << 40])
@pytest.mark.parametrize("shape", [(960, 576), (1003, 1001), (1, 500_000), (3, 0)])
def test_vector_products_alone_and_shared(
    shape: tuple[int, int], min_shared_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vector_product, "_MIN_SHARED_BYTES", min_shared_bytes)
    rng = np.random.default_rng(4)
    weight, x = rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape[1], dtype=np.float32)
    expected = weight.astype(np.float64) @ x
    np.testing.assert_allclose(vector_product(weight, x), expected, atol=1e-5 * np.abs(expected).max())


def test_embedding_takes_rows_and_clamps_ids() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(embedding(np.array([2, 0, 2], np.int32), table), table[[2, 0, 2]])
    np.testing.assert_array_equal(embedding(np.array([-5, 99], np.int32), table), table[[0, 3]])
    out = np.full((1, 3), np.nan, np.float32)
    assert embedding(np.array([1], np.int32), table, out=out) is out
    np.testing.assert_array_equal(out, table[[1]])


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_the_gate_comes_first(has_bias: bool) -> None:
    rng = np.random.default_rng(0)
    x, gate, up = (rng.standard_normal(shape, dtype=np.float32) for shape in ((5, 24), (16, 24), (16, 24)))
    biases = rng.standard_normal((2, 16), dtype=np.float32) if has_bias else np.zeros((2, 16), np.float32)
    gates, ups = x @ gate.T + biases[0], x @ up.T + biases[1]
    bias = biases.reshape(-1) if has_bias else None
    result = gated_linear(x, np.concatenate([gate, up]), bias, gated_activation("silu"))
    np.testing.assert_allclose(result, gates / (1 + np.exp(-gates)) * ups, rtol=1e-4, atol=1e-5)
