"""How products of few rows are cut up for their kernel, on any machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cupy_engine.ops import _skinny_gemm
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._skinny_gemm import SkinnyProduct, skinny_product, skinny_products


def shape_of(m: int, n: int, k: int) -> Shape:
    return Shape(m, n, k, k, "bfloat16", "bfloat16", False)


def array(rows: int, columns: int, address: int) -> Any:
    return SimpleNamespace(
        shape=(rows, columns), strides=(2 * columns, 2), itemsize=2, data=SimpleNamespace(ptr=address)
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be launched: the arguments, maps as theirs, and the options."""
    launches: list[Any] = []
    monkeypatch.setattr(_skinny_gemm, "tensor_map", lambda *arguments: arguments)
    monkeypatch.setattr(
        _skinny_gemm, "launch_with_maps", lambda *arguments, **options: launches.append((arguments, options))
    )
    return launches


@pytest.fixture
def _on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_skinny_gemm, "is_hopper", lambda: True)
    monkeypatch.setattr(_skinny_gemm, "num_multiprocessors", lambda: 132)


def test_a_product(launched: list[Any]) -> None:
    x, weight, out = array(20, 4096, 16), array(6144, 4096, 32), array(20, 6144, 48)
    SkinnyProduct(shape_of(20, 6144, 4096), 4).run(x, weight, None, out)
    [(arguments, options)] = launched
    assert arguments[1:4] == ("gemm_skinny_sm90<bf16, bf16, 32, Plain>", (4, 48), 288)
    assert arguments[4] == (16, "bf16", (4096, 20), (8192,), (64, 32))
    assert arguments[5] == (32, "bf16", (4096, 6144), (8192,), (64, 128))
    assert arguments[6:] == (out, None, 20, 6144, 4096)
    assert options == {"shared_bytes": 5 * (16384 + 4096) + 1024, "cluster": 4}


def test_gates_come_eight_at_a_time_with_their_ups(launched: list[Any]) -> None:
    x, weight, out = array(1, 4096, 16), array(2 * 14336, 4096, 32), array(1, 14336, 48)
    SkinnyProduct(shape_of(1, 2 * 14336, 4096), 1, "Silu").run(x, weight, None, out)
    [(arguments, _)] = launched
    assert arguments[1:4] == ("gemm_skinny_sm90<bf16, bf16, 8, Silu>", (1, 224), 288)
    assert arguments[5] == (32, "bf16", (4096, 8, 2, 1792), (8192, 14336 * 8192, 65536), (64, 8, 2, 8))
    assert arguments[6:] == (out, None, 1, 14336, 4096)


@pytest.mark.usefixtures("_on_an_h100")
@pytest.mark.parametrize(
    ("shape", "functor", "names"),
    [
        (shape_of(1, 6144, 4096), "Plain", ["skinny4", "skinny2"]),
        (shape_of(1, 4096, 14336), "Plain", ["skinny8", "skinny4"]),
        (shape_of(1, 28672, 4096), "Silu", ["skinny1"]),
        (shape_of(1, 128256, 4096), "Plain", ["skinny1"]),
        (shape_of(1, 576, 128), "Plain", ["skinny2", "skinny1"]),
        (shape_of(129, 4096, 4096), "Plain", []),
    ],
    ids=str,
)
def test_ways_that_are_timed(shape: Shape, functor: str, names: list[str]) -> None:
    assert [way.name for way in skinny_products(shape, functor)] == names
    for name in names:
        way = skinny_product(name, shape, functor)
        assert way is not None
        assert way.name == name
    assert skinny_product("skinny3", shape, functor) is None
    assert skinny_product("gemv", shape, functor) is None
