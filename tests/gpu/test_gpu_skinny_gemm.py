"""Products of few rows by the kernel that shares k among the blocks of a cluster, against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gpu_arrays import DTYPES, ROUNDING, poisoned, random, relative_error, to_gpu

from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._launch import is_hopper
from cupy_engine.ops._skinny_gemm import PLAIN, SkinnyProduct, can_be_skinny, skinny_product, skinny_products
from cupy_engine.ops.activation import gated_activation

pytestmark = pytest.mark.gpu

HALVES = [name for name in DTYPES if name != "float32"]
SHAPES = [  # rows, columns, depth
    *[(1, 8, 8), (1, 128, 4096), (2, 1000, 520), (7, 136, 1032), (8, 4096, 64), (9, 264, 512), (16, 520, 1096)],
    *[(17, 128, 2048), (33, 200, 576), (64, 1160, 1024), (65, 136, 640), (100, 384, 1000), (128, 640, 1536)],
]
WAYS = [(shape, parts) for shape in SHAPES for parts in (1, 2, 4, 8) if parts <= -(-shape[2] // 64)]


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if not is_hopper():
        pytest.skip("the kernel is for sm_90a")


def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64).T


def silu_exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    gates, ups = np.split(exact(x, weight), 2, axis=1)
    return gates / (1 + np.exp(-gates)) * ups


def inputs(rng: np.random.Generator, m: int, n: int, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    weight = random(rng, (n, k), np.float32) / math.sqrt(k)
    return random(rng, (m, k), DTYPES[dtype]), weight.astype(DTYPES[dtype])


def shape_of(m: int, n: int, k: int, dtype: str, out_dtype: str = "", has_bias: bool = False) -> Shape:
    return Shape(m, n, k, k, dtype, out_dtype or dtype, has_bias)


def run(product: SkinnyProduct, x: Any, weight: Any, bias: Any, m: int, n: int, dtype: Any) -> Any:
    """Its result, with nothing written before or behind."""
    around = poisoned((m + 2, n), dtype)
    product.run(x, weight, bias, around[1:-1])
    for row in (around[0], around[-1]):
        assert np.array_equal(row.get().view(np.uint8), poisoned((n,), dtype).get().view(np.uint8))
    return around[1:-1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "parts"), WAYS, ids=str)
def test_a_product(rng: np.random.Generator, shape: tuple[int, int, int], parts: int, dtype: str) -> None:
    m, n, k = shape
    x, weight = inputs(rng, m, n, k, dtype)
    out = run(SkinnyProduct(shape_of(*shape, dtype), parts), to_gpu(x), to_gpu(weight), None, m, n, DTYPES[dtype])
    assert relative_error(out, exact(x, weight)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "parts"), [way for way in WAYS if way[1] in (1, 4)], ids=str)
def test_a_gated_product(rng: np.random.Generator, shape: tuple[int, int, int], parts: int, dtype: str) -> None:
    m, inter, k = shape
    x, weight = inputs(rng, m, 2 * inter, k, dtype)
    product = SkinnyProduct(shape_of(m, 2 * inter, k, dtype), parts, "Silu")
    out = run(product, to_gpu(x), to_gpu(weight), None, m, inter, DTYPES[dtype])
    assert relative_error(out, silu_exact(x, weight)) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
def test_other_activations(rng: np.random.Generator, name: str) -> None:
    x, weight = inputs(rng, 5, 256, 192, "bfloat16")
    functor = gated_activation(name).functor
    out = run(
        SkinnyProduct(shape_of(5, 256, 192, "bfloat16"), 2, functor),
        *(to_gpu(x), to_gpu(weight), None, 5, 128, DTYPES["bfloat16"]),
    )
    gates, ups = np.split(exact(x, weight), 2, axis=1)
    halves = np.vectorize(math.erf)(gates / math.sqrt(2))
    if name == "gelu_new":
        halves = np.tanh(math.sqrt(2 / math.pi) * (gates + 0.044715 * gates**3))
    assert relative_error(out, gates / 2 * (1 + halves) * ups) < ROUNDING["bfloat16"]


@pytest.mark.parametrize("out_dtype", ["", "float32"])
def test_bias_and_accumulators(rng: np.random.Generator, out_dtype: str) -> None:
    x, weight = inputs(rng, 12, 1000, 576, "float16")
    dtype = out_dtype or "float16"
    bias = random(rng, (1000,), DTYPES[dtype])
    product = SkinnyProduct(shape_of(12, 1000, 576, "float16", dtype, True), 4)
    out = run(product, to_gpu(x), to_gpu(weight), to_gpu(bias), 12, 1000, DTYPES[dtype])
    assert relative_error(out, exact(x, weight) + bias.astype(np.float64)) < ROUNDING[dtype]


def test_rows_of_a_wider_array(rng: np.random.Generator) -> None:
    wide, weight = inputs(rng, 7, 64, 256, "float16")
    x, weight = to_gpu(wide)[:, 128:], weight[:, 128:]
    product = SkinnyProduct(Shape(7, 64, 128, 256, "float16", "float16", False), 2)
    out = run(product, x, to_gpu(weight), None, 7, 64, np.float16)
    assert relative_error(out, exact(wide[:, 128:], weight)) < ROUNDING["float16"]


def test_sums_do_not_depend_on_chance(rng: np.random.Generator) -> None:
    x, weight = (to_gpu(array) for array in inputs(rng, 3, 512, 8192, "bfloat16"))
    product, results = SkinnyProduct(shape_of(3, 512, 8192, "bfloat16"), 8), set()
    for _ in range(20):
        out = poisoned((3, 512), DTYPES["bfloat16"])
        product.run(x, weight, None, out)
        results.add(out.get().tobytes())
    assert len(results) == 1


def test_kernels_before_and_behind_are_waited_for(rng: np.random.Generator) -> None:
    """A chain of products, each of which starts while the one before still runs, as in a captured step."""
    import cupy

    k, length = 1024, 40
    start = random(rng, (4, k), np.float16)
    rotation, _ = np.linalg.qr(rng.standard_normal((k, k)))
    weight = to_gpu(rotation.astype(np.float16))
    product = SkinnyProduct(shape_of(4, k, k, "float16"), 8)
    x, y = to_gpu(start), poisoned((4, k), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        for _ in range(length // 2):
            product.run(x, weight, None, y)
            product.run(y, weight, None, x)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    expected = start
    for _ in range(length):
        expected = exact(expected, weight.get()).astype(np.float16)
    assert relative_error(x, expected) < 20 * ROUNDING["float16"]


def test_names_lead_back_to_ways() -> None:
    shape = shape_of(16, 4096, 4096, "bfloat16")
    ways = list(skinny_products(shape))
    assert [way.name for way in ways] == ["skinny8", "skinny4"]
    assert [skinny_product(way.name, shape).name for way in ways] == ["skinny8", "skinny4"]  # type: ignore[union-attr]
    assert [skinny_product(name, shape) for name in (None, "gemv", "skinny3", "0f" * 64)] == [None] * 4


@pytest.mark.parametrize(
    ("shape", "functor"),
    [
        (shape_of(129, 4096, 4096, "bfloat16"), PLAIN),
        (shape_of(1, 4096, 4096, "float32"), PLAIN),
        (shape_of(1, 4092, 4096, "bfloat16"), PLAIN),
        (shape_of(1, 4096, 4100, "bfloat16"), PLAIN),
        (Shape(2, 4096, 4096, 4100, "bfloat16", "bfloat16", False), PLAIN),
        (shape_of(1, 4096 + 8, 4096, "bfloat16"), "Silu"),
        (shape_of(1, 4096, 4096, "bfloat16", "float32"), "Silu"),
        (shape_of(1, 4096, 4096, "bfloat16", has_bias=True), "Silu"),
    ],
    ids=str,
)
def test_what_it_does_not_compute(shape: Shape, functor: str) -> None:
    assert not can_be_skinny(shape, functor)
    assert list(skinny_products(shape, functor)) == []
