"""The first half of a gated MLP on the GPU, in one kernel and in two, against float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gpu_arrays import DTYPES, ROUNDING, poisoned, random, relative_error, to_gpu

from cupy_engine.ops import _gated_gemm, _gemm_table, _gemm_tuning
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._gated_gemm import FusedProduct
from cupy_engine.ops._launch import is_hopper
from cupy_engine.ops.activation import GATED_ACTIVATIONS, gated_activation
from cupy_engine.ops.gated_linear import gated_linear

pytestmark = pytest.mark.gpu

HALVES = [name for name in DTYPES if name != "float32"]


def needs_hopper() -> None:
    if not is_hopper():
        pytest.skip("the kernel is for sm_90a")


def exact(x: np.ndarray, weight: np.ndarray, activation: str = "silu") -> np.ndarray:
    gates, ups = np.split(x.astype(np.float64) @ weight.astype(np.float64).T, 2, axis=1)
    if activation == "silu":
        return gates / (1 + np.exp(-gates)) * ups
    if activation == "gelu":
        return gates * (1 + np.vectorize(math.erf)(gates / math.sqrt(2))) / 2 * ups
    return gates / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gates + 0.044715 * gates**3))) * ups


def inputs(rng: np.random.Generator, m: int, inter: int, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    weight = random(rng, (2 * inter, k), np.float32) / math.sqrt(k)
    return random(rng, (m, k), DTYPES[dtype]), weight.astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 8, 8), (3, 136, 72), (64, 64, 64), (65, 128, 200), (128, 200, 320), (129, 1000, 64), (257, 264, 1032)],
        *[(2048, 2176, 256), (2305, 1160, 136)],  # more tiles than the GPU holds clusters
    ],
    ids=str,
)
def test_one_kernel(rng: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> None:
    needs_hopper()
    m, inter, k = shape
    x, weight = inputs(rng, m, inter, k, dtype)
    around = poisoned((m + 2, inter), DTYPES[dtype])
    FusedProduct("Silu").run(to_gpu(x), to_gpu(weight), None, around[1:-1])
    assert relative_error(around[1:-1], exact(x, weight)) < ROUNDING[dtype]
    for row in (around[0], around[-1]):
        assert np.array_equal(row.get().view(np.uint8), poisoned((inter,), DTYPES[dtype]).get().view(np.uint8))


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_every_activation(rng: np.random.Generator, activation: str) -> None:
    needs_hopper()
    x, weight = inputs(rng, 100, 256, 128, "bfloat16")
    out = poisoned((100, 256), DTYPES["bfloat16"])
    FusedProduct(gated_activation(activation).functor).run(to_gpu(x), to_gpu(weight), None, out)
    name = {"swish": "silu"}.get(activation, activation)
    assert relative_error(out, exact(x, weight, name)) < ROUNDING["bfloat16"]


def test_rows_of_a_wider_array(rng: np.random.Generator) -> None:
    needs_hopper()
    wide, weight = inputs(rng, 70, 128, 256, "float16")
    out = poisoned((70, 128), np.float16)
    FusedProduct("Silu").run(to_gpu(wide)[:, 128:], to_gpu(weight[:, 128:]), None, out)
    assert relative_error(out, exact(wide[:, 128:], weight[:, 128:])) < ROUNDING["float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("m", [0, 1, 20, 200])
def test_whatever_kernel_is_chosen(
    rng: np.random.Generator, m: int, has_bias: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _gemm_table.GemmTable(tmp_path / "table.json")
    monkeypatch.setattr(_gemm_table, "table", lambda: table)
    monkeypatch.setattr(_gemm_tuning, "table", lambda: table)
    x, weight = inputs(rng, m, 136, 192, dtype)
    bias = random(rng, (272,), DTYPES[dtype]) if has_bias else None
    wide = np.hstack([x, np.ones((m, 1), x.dtype)])
    all_weights = weight if bias is None else np.hstack([weight, bias[:, None]])
    expected = exact(x if bias is None else wide, all_weights)
    arrays = to_gpu(x), to_gpu(weight), None if bias is None else to_gpu(bias)
    _gated_gemm.forget_products()
    results = [gated_linear(*arrays, gated_activation("silu"))]
    _gemm_tuning.tune_gated([arrays[1]] * 2, [max(1, m)], "Silu", has_bias)
    names = [table.get(Shape(max(1, m), 272, 192, 192, dtype, dtype, has_bias), "Silu")]
    assert (names[0] in ("fused", "apart")) == (m == 200 and is_hopper() and not has_bias and dtype != "float32")
    results.append(gated_linear(*arrays, gated_activation("silu")))
    for result in results:
        assert result.shape == (m, 136)
        assert m == 0 or relative_error(result, expected) < 2 * ROUNDING[dtype]  # gates and ups may be rounded, too
    _gated_gemm.forget_products()


def test_a_captured_launch_reads_what_is_there_then(rng: np.random.Generator) -> None:
    import cupy

    needs_hopper()
    x, weight = inputs(rng, 300, 128, 256, "float16")
    x_gpu, weight_gpu, out = to_gpu(x), to_gpu(weight), poisoned((300, 128), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        FusedProduct("Silu").run(x_gpu, weight_gpu, None, out)
        stream.begin_capture()
        FusedProduct("Silu").run(x_gpu, weight_gpu, None, out)
        graph = stream.end_capture()
        replaced = random(rng, (300, 256), np.float16)
        x_gpu.set(replaced, stream=stream)
        graph.launch(stream)
        stream.synchronize()
    assert relative_error(out, exact(replaced, weight)) < ROUNDING["float16"]
