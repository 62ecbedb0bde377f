"""Matrix products on the GPU against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_arrays import DTYPES, ROUNDING, poisoned, random, relative_error, to_gpu

from cupy_engine.ops import _gemm, _gemm_table, _gemm_tuning
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops.linear import linear

pytestmark = pytest.mark.gpu


def exact(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    return product if bias is None else product + bias.astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "shape",
    [(1, 576, 192), (1, 35, 1088), (2, 50, 64), (3, 40, 520), (4, 24, 72), (5, 37, 41), (200, 320, 576)],
    ids=str,
)
def test_linear(rng: np.random.Generator, shape: tuple[int, int, int], has_bias: bool, dtype: str) -> None:
    m, n, k = shape
    x, weight = random(rng, (m, k), DTYPES[dtype]), random(rng, (n, k), DTYPES[dtype])
    bias = random(rng, (n,), DTYPES[dtype]) if has_bias else None
    result = linear(to_gpu(x), to_gpu(weight), None if bias is None else to_gpu(bias))
    assert result.dtype == x.dtype
    assert relative_error(result, exact(x, weight, bias)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 40])
def test_float32_results_keep_the_accumulators(rng: np.random.Generator, m: int, dtype: str) -> None:
    x, weight = random(rng, (m, 576), DTYPES[dtype]), random(rng, (1000, 576), DTYPES[dtype])
    result = linear(to_gpu(x), to_gpu(weight), out_dtype=np.float32)
    assert result.dtype == np.float32
    assert relative_error(result, exact(x, weight, None)) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 33])
def test_every_candidate_computes_the_product(rng: np.random.Generator, m: int, dtype: str) -> None:
    x, weight = random(rng, (m, 512), DTYPES[dtype]), random(rng, (384, 512), DTYPES[dtype])
    shape = Shape(m, 384, 512, 512, dtype, dtype, False)
    products = _gemm.candidates(shape)
    assert (m <= 4) == any(product.name == "gemv" for product in products)
    for product in products:
        out = poisoned((m, 384), DTYPES[dtype])
        product.run(to_gpu(x), to_gpu(weight), None, out)
        assert relative_error(out, exact(x, weight, None)) < ROUNDING[dtype], product.name


def test_rows_of_a_wider_array(rng: np.random.Generator) -> None:
    wide, weight = random(rng, (7, 256), np.float16), random(rng, (64, 128), np.float16)
    result = linear(to_gpu(wide)[:, 128:], to_gpu(weight))
    assert relative_error(result, exact(wide[:, 128:], weight, None)) < ROUNDING["float16"]


def test_no_rows_launch_nothing() -> None:
    assert linear(to_gpu(np.empty((0, 64), np.float32)), to_gpu(np.ones((32, 64), np.float32))).shape == (0, 32)


def test_different_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal dtypes"):
        linear(to_gpu(np.ones((2, 64), np.float32)), to_gpu(np.ones((32, 64), np.float16)))


def test_tuned_choices_outlive_the_process(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _gemm_table.GemmTable(tmp_path / "table.json")
    monkeypatch.setattr(_gemm_table, "table", lambda: table)
    monkeypatch.setattr(_gemm_tuning, "table", lambda: table)
    weights = [to_gpu(random(rng, (256, 512), np.float16)) for _ in range(3)]
    _gemm_tuning.tune(weights, [1, 3, 100])
    shapes = [Shape(m, 256, 512, 512, "float16", "float16", False) for m in (1, 4, 128)]
    names = [table.get(shape) for shape in shapes]
    assert all(names)
    reread = _gemm_table.GemmTable(tmp_path / "table.json")
    assert [reread.get(shape) for shape in shapes] == names
    assert [_gemm.product(shape, 16).name for shape in shapes] == names
    _gemm.forget_products()


@pytest.mark.parametrize("m", [1, 4, 64])
def test_products_can_be_captured(rng: np.random.Generator, m: int) -> None:
    import cupy

    x, weight = random(rng, (m, 256), np.float16), random(rng, (192, 256), np.float16)
    x_gpu, weight_gpu, out = to_gpu(x), to_gpu(weight), poisoned((m, 192), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        _gemm.matmul(x_gpu, weight_gpu, out=out)
        stream.begin_capture()
        _gemm.matmul(x_gpu, weight_gpu, out=out)
        graph = stream.end_capture()
        replaced: Any = random(rng, (m, 256), np.float16)
        x_gpu.set(replaced, stream=stream)
        graph.launch(stream)
        stream.synchronize()
    assert relative_error(out, exact(replaced, weight, None)) < ROUNDING["float16"]
