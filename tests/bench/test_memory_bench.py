"""Where memory goes, and how full the pool gets."""

from __future__ import annotations

import argparse
import json

import pytest
from cupy_engine.bench import memory_usage
from cupy_engine.bench.pool_probe import PoolProbe
from golden_data import tiny_model

from cupy_engine import Engine, SamplingParams

TINY = str(tiny_model("llama"))


def run(*options: str) -> None:
    parser = argparse.ArgumentParser()
    memory_usage.add_arguments(parser)
    assert memory_usage.run(parser.parse_args(["--model", TINY, "--device", "cpu", *options])) == 0


def test_the_pool_fills_before_anybody_makes_room(capsys: pytest.CaptureFixture[str]) -> None:
    run("--input-len", "20", "--output-len", "40", "--num-kv-blocks", "100", "--json")
    printed = json.loads(capsys.readouterr().out)
    (ours,) = printed["results"]
    assert printed["num_kv_blocks"] == 100
    assert ours["num_preemptions"] > 0
    assert 0.96 <= ours["kv_blocks_used"] <= 1
    assert ours["kv_places_filled"] < ours["kv_blocks_used"]
    assert 0 < ours["kv_waste"] < 0.4  # half a block of some three
    assert 0 < ours["weight_bytes"] < ours["host_bytes"] <= ours["host_peak_bytes"]


def test_without_a_length_enough_requests_fit_to_fill_the_pool(capsys: pytest.CaptureFixture[str]) -> None:
    run("--output-len", "16", "--num-kv-blocks", "100", "--json")
    (ours,) = json.loads(capsys.readouterr().out)["results"]
    assert ours["num_preemptions"] > 0
    assert ours["kv_blocks_used"] >= 0.96


def test_a_pool_that_never_fills_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run("--input-len", "200", "--output-len", "2", "--num-kv-blocks", "16")
    assert "never full: let more and shorter requests fit, see --input-len" in capsys.readouterr().out


def test_waste_is_the_empty_end_of_the_last_block() -> None:
    with Engine(TINY, device="cpu", num_kv_blocks=32, enable_prefix_caching=False) as engine:
        with PoolProbe.watching(engine._core) as probe:
            engine.generate([list(range(20))], SamplingParams(max_tokens=1))
        assert "schedule" not in vars(engine._core.scheduler)
    figures = probe.figures()
    assert figures["kv_blocks_used"] == 2 / 32
    assert figures["kv_waste"] == pytest.approx(12 / 32)
    assert figures["num_preemptions"] == 0
