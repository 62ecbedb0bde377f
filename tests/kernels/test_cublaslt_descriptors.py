"""cuBLASLt descriptors can be built without a GPU; algorithms cannot be asked for."""

from __future__ import annotations

import ctypes

import pytest

from cupy_engine.ops._cublaslt import Algorithm, CublasLtError, Matmul, Shape

pathfinder = pytest.importorskip("cuda.pathfinder", reason="the CUDA extra is not installed")


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    try:
        pathfinder.load_nvidia_dynamic_lib("cublasLt")
    except pathfinder.DynamicLibNotFoundError:
        pytest.skip("cuBLASLt is not installed")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_descriptors_build(dtype: str, has_bias: bool) -> None:
    for out_dtype in {dtype, "float32"}:
        Matmul(Shape(3, 64, 128, 256, dtype, out_dtype, has_bias))


def test_attributes_the_library_does_not_know_are_refused() -> None:
    matmul = Matmul(Shape(3, 64, 128, 128, "float16", "float16", False))
    with pytest.raises(CublasLtError, match="cublasLtMatmulDescSetAttribute"):
        matmul._set(9999, ctypes.c_int32(1))


def test_algorithms_are_64_opaque_bytes() -> None:
    text = bytes(range(64)).hex()
    algorithm = Algorithm.from_hex(text)
    assert algorithm is not None
    assert algorithm.to_hex() == text
    assert Algorithm.from_hex(text[:-2]) is None
    assert Algorithm.from_hex("gemv") is None
