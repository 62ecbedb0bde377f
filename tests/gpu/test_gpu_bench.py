"""Benchmarks that need a GPU."""

from __future__ import annotations

import argparse
import json

import pytest
from cupy_engine.bench import throughput
from golden_data import tiny_model

pytestmark = pytest.mark.gpu


def test_busy_share_and_host_work(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    sizes = ["--input-len", "9", "--output-len", "20", "--batch-size", "4", "--repeat", "1"]
    arguments = parser.parse_args(
        ["--model", str(tiny_model("llama")), "--device", "cuda", *sizes, "--gpu-busy", "--json"]
    )
    assert throughput.run(arguments) == 0
    (ours,) = json.loads(capsys.readouterr().out)["results"]
    assert 0 < ours["gpu_busy_events"] <= 1
    assert 0 < ours["host_submit_s"] < ours["host_work_s"] < 1
