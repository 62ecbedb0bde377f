"""The table of fastest products: its keys, its file, and files it cannot use."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._gemm_table import GemmTable, row_bucket, row_buckets

SHAPE = Shape(16, 4096, 1024, 1024, "bfloat16", "bfloat16", False)
ALGORITHM = "0f" * 64


def test_row_buckets_are_powers_of_two_and_three_quarters_of_the_large_ones() -> None:
    assert [row_bucket(m) for m in (1, 2, 3, 4, 5, 64, 65, 8192)] == [1, 2, 4, 4, 8, 64, 96, 8192]
    assert [row_bucket(m) for m in (48, 97, 129, 192, 193, 257, 384, 385)] == [64, 128, 192, 192, 256, 384, 384, 512]
    assert row_buckets(300) == [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384]


def test_an_entry_serves_its_row_bucket_and_any_stride(tmp_path: Path) -> None:
    table = GemmTable(tmp_path / "table.json")
    table.set(SHAPE, ALGORITHM)
    assert table.get(replace(SHAPE, m=9, stride=2048)) == ALGORITHM
    for other in ({"m": 8}, {"m": 17}, {"n": 1}, {"k": 1}, {"dtype": "float16"}, {"out_dtype": "float32"}):
        assert table.get(replace(SHAPE, **other)) is None
    assert table.get(replace(SHAPE, has_bias=True)) is None


def test_gated_products_have_entries_of_their_own(tmp_path: Path) -> None:
    table = GemmTable(tmp_path / "table.json")
    table.set(SHAPE, ALGORITHM)
    table.set(SHAPE, "fused", "Silu")
    table.save()
    reread = GemmTable(tmp_path / "table.json")
    assert (reread.get(SHAPE), reread.get(SHAPE, "Silu"), reread.get(SHAPE, "Gelu")) == (ALGORITHM, "fused", None)


def test_entries_are_kept_and_merged_with_those_of_other_processes(tmp_path: Path) -> None:
    first, second = GemmTable(tmp_path / "gemm" / "table.json"), GemmTable(tmp_path / "gemm" / "table.json")
    first.set(SHAPE, ALGORITHM)
    first.save()
    second.set(replace(SHAPE, m=1), "gemv")
    second.save()
    reread = GemmTable(tmp_path / "gemm" / "table.json")
    assert reread.get(SHAPE) == ALGORITHM
    assert reread.get(replace(SHAPE, m=1)) == "gemv"
    assert [path.name for path in (tmp_path / "gemm").iterdir()] == ["table.json"]


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '{"16 4096 1024 bfloat16 bfloat16 0": "rm"}', '{"a": 3}'])
def test_a_damaged_file_is_ignored(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    assert GemmTable(path).get(SHAPE) is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    table = GemmTable(tmp_path / "file" / "table.json")
    table.set(SHAPE, ALGORITHM)
    with caplog.at_level(logging.WARNING):
        table.save()
    assert "cannot keep GEMM timings" in caplog.text
    assert table.get(SHAPE) == ALGORITHM
