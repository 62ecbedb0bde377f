"""The benchmarks: their workloads, and that each runs and prints what it says."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cupy_engine.bench import host, latency, memory_usage, throughput
from cupy_engine.bench.host_clock import HostClock
from cupy_engine.bench.workloads import SHAPES, Workload, named_workload, write_shape
from cupy_engine.server.cli import main
from golden_data import tiny_model

from cupy_engine import Engine, SamplingParams
from cupy_engine.errors import ConfigError
from cupy_engine.hf_config import load_hf_config

TINY = ["--model", str(tiny_model("llama")), "--input-len", "9", "--output-len", "5", "--repeat", "2"]


def run(module: Any, options: list[str]) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args(options)) == 0


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("ttft-2048", (2048, 1, 1)),
        ("lat", (128, 256, 1)),
        ("dec-32", (32, 256, 32)),
        ("thr-short", (128, 256, 256)),
        ("thr-long", (1024, 128, 200)),
    ],
)
def test_named_workloads(name: str, lengths: tuple[int, int, int]) -> None:
    assert named_workload(name) == Workload(name, *lengths)


@pytest.mark.parametrize("name", ["", "ttft-", "ttft-0", "dec-x", "dec--1", "thr"])
def test_unknown_workloads(name: str) -> None:
    with pytest.raises(ConfigError, match="there are ttft-N, dec-B, lat, thr-short, thr-long"):
        named_workload(name)


def test_prompts_are_fresh_and_in_the_vocabulary() -> None:
    workload, rng = Workload("custom", 7, 3, 4), np.random.default_rng(0)
    first, second = (workload.prompts(50, rng) for _ in range(2))
    assert [len(prompt["prompt_token_ids"]) for prompt in first] == [7] * 4
    assert all(0 <= token < 50 for prompt in first for token in prompt["prompt_token_ids"])
    assert first != second


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_model_folders(name: str, tmp_path: Path) -> None:
    config = load_hf_config(write_shape(name, tmp_path))
    assert config.hidden_size == config.num_heads * config.head_dim
    assert config.max_position_embeddings >= 8193


def test_latency_reports_steps(capsys: pytest.CaptureFixture[str]) -> None:
    run(latency, [*TINY, "--batch-size", "3", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["workloads"] == [{"name": "custom", "input_len": 9, "output_len": 5, "num_requests": 3}]
    (ours,) = printed["results"]
    step = ours["decode_step_s"]
    assert 0 < step["low"] <= step["median"] <= step["high"]
    assert ours["decode_tokens_per_s"]["high"] == pytest.approx(3 / step["low"])
    assert ours["ttft_s"]["low"] > 0


def test_latency_percentiles(capsys: pytest.CaptureFixture[str]) -> None:
    run(latency, [*TINY, "--batch-size", "3", "--json", "--percentiles", "0", "50", "99.9"])
    (ours,) = json.loads(capsys.readouterr().out)["results"]
    for name in ("ttft_s", "itl_s"):
        assert 0 < ours[f"{name}_p0"] <= ours[f"{name}_p50"] <= ours[f"{name}_p99.9"]


def test_throughput_counts_all_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    run(throughput, [*TINY, "--num-requests", "4", "--json", "--repeat", "1"])
    printed = json.loads(capsys.readouterr().out)
    (ours,) = printed["results"]
    requests_per_s = ours["requests_per_s"]["median"]
    assert ours["output_tokens_per_s"]["median"] == pytest.approx(5 * requests_per_s)
    assert ours["total_tokens_per_s"]["median"] == pytest.approx(14 * requests_per_s)


def test_several_workloads_and_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    run(throughput, [*TINY, "--workload", "ttft-3", "dec-2", "--repeat", "1", "--json", str(file)])
    names = [row["name"] for row in json.loads(file.read_text())["results"]]
    assert names == ["ttft-3: cupy-engine, NumPy (CPU)", "dec-2: cupy-engine, NumPy (CPU)"]
    assert "llama: 1 request 3 → 1; 2 requests 32 → 256, 1 run" in capsys.readouterr().out


@pytest.mark.parametrize("module", [throughput, latency, memory_usage])
def test_requests_have_room_for_all_their_tokens(module: Any) -> None:
    lengths = ["--output-len", "512"] if module is memory_usage else ["--input-len", "500", "--output-len", "13"]
    with pytest.raises(ConfigError, match=r"output_len: \d+ tokens after a prompt of \d+ are more than the 512 that"):
        run(module, ["--model", str(tiny_model("llama")), *lengths])


def test_a_shape_has_no_weights() -> None:
    with pytest.raises(ConfigError, match="'llama3-8b' is a shape without weights: give --load-format dummy"):
        run(throughput, ["--model", "llama3-8b"])


def test_gpu_busy_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="gpu_busy: is measured on a GPU, and the engine runs on NumPy"):
        run(throughput, [*TINY, "--device", "cpu", "--gpu-busy"])


def test_the_host_clock_leaves_no_trace() -> None:
    with Engine(str(tiny_model("llama")), device="cpu") as engine:
        core = engine._core
        parts = [core.scheduler, core._executor]
        before = [set(vars(part)) for part in parts]
        with HostClock.watching(core) as clock:
            engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=6, ignore_eos=True), progress=False)
        assert [set(vars(part)) for part in parts] == before
    figures = clock.figures()
    assert figures.keys() == {f"host_{name}_s" for name in ("turn", "work", "schedule", "submit", "update")}
    assert figures["host_work_s"] > figures["host_submit_s"] > 0  # in this process, a step is computed in submit
    assert figures["host_turn_s"] > 0


def test_text_output_and_a_single_token(capsys: pytest.CaptureFixture[str]) -> None:
    run(latency, [*TINY, "--workload", "ttft-12"])
    printed = capsys.readouterr().out
    assert re.match(r"llama: 1 request 12 → 1, 2 runs; import [\d.]+ s, construction [\d.]+ s\n", printed)
    assert "TTFT" in printed
    assert "decode" not in printed


@pytest.mark.parametrize(
    ("command", "option", "value", "error"),
    [
        ("throughput", "--batch-size", "0", "argument --batch-size/--num-requests: must be at least 1, got 0"),
        ("latency", "--output-len", "-1", "argument --output-len: must be at least 1, got -1"),
        ("latency", "--percentiles", "101", "argument --percentiles: must be between 0 and 100, got 101"),
        ("serve", "--concurrent-requests", "0", "argument --concurrent-requests: must be at least 1, got 0"),
        ("serve", "--duration", "nan", "argument --duration: must be a number above 0, got nan"),
        ("serve", "--request-rate", "0", "argument --request-rate: must be a number above 0, got 0"),
        ("memory", "--input-len", "0", "argument --input-len: must be at least 1, got 0"),
        ("host", "--repeat", "many", "argument --repeat: invalid count value: 'many'"),
    ],
)
def test_bad_numbers_are_refused_by_the_name_that_was_typed(
    command: str, option: str, value: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", command, option, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"cupy-engine bench {command}: error: {error}\n")


def test_host_overhead_from_the_command_line() -> None:
    command = [sys.executable, "-m", "cupy_engine.bench.latency", *TINY, "--batch-size", "2", "--host-overhead"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    overhead = json.loads(done.stdout)["results"][0]["host_overhead"]
    assert 0 < overhead["median"] < 1


def test_the_engines_own_work_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    run(host, ["--batch-size", "4", "--input-len", "20", "--output-len", "12", "--repeat", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["name"] for row in rows] == ["no prefix cache", "prefix cache"]
    for row in rows:
        parts = [row[f"host_{name}_s"]["median"] for name in ("schedule", "submit", "update")]
        assert all(part > 0 for part in parts)
        assert row["host_work_s"]["median"] > max(parts)
