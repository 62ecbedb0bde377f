"""The overload benchmark says how a server does at twice its capacity, or that it had no time to see."""

from __future__ import annotations

import json
import subprocess
import sys


def overload(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cupy_engine.bench.overload", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_half_and_twice_of_the_capacity_in_turns() -> None:
    done = overload("--seconds", "4", "--turns", "2", "--output-len", "16", "--max-num-seqs", "4", "--clients", "8")
    assert done.returncode == 0, done.stderr
    runs = {figures.pop("run"): figures for figures in map(json.loads, done.stdout.splitlines())}
    assert list(runs) == ["capacity", "without targets", "uncongested", "overloaded", "overloaded / uncongested"]
    calm, loaded, ratios = runs["uncongested"], runs["overloaded"], runs["overloaded / uncongested"]
    num_calm, num_loaded = (each["num_accepted"] + each["num_refused"] for each in (calm, loaded))
    assert 2 * num_calm < num_loaded < 8 * num_calm
    assert loaded["num_refused"] > 0
    assert loaded["num_lost"] == loaded["num_cut_off"] == 0
    assert loaded["other"] == {}
    assert ratios["ttft_p99_ms"] == round(loaded["ttft_p99_ms"] / calm["ttft_p99_ms"], 2)


def test_too_short_a_time_is_told() -> None:
    done = overload("--seconds", "0.001")
    assert done.returncode == 1
    assert done.stderr == "error: seconds: no request was answered in 0.0005 s; give it more\n"
