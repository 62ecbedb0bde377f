"""The doctor on machines of every kind: what it sees, what it calls a problem, what it says would fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cupy_engine.server import diagnosis, kernel_check
from cupy_engine.server.cli import main
from cupy_engine.server.diagnosis import Diagnosis, diagnose, find_problems, plan_model
from cupy_engine.server.machine import Cpu, Driver, Gpu, Library
from golden_data import tiny_model

from cupy_engine.config import EngineConfig
from cupy_engine.ops._compile_report import CompiledFile, CompiledKernel

GIB = 1 << 30
LLAMA = str(tiny_model("llama"))
H100 = Gpu(0, "NVIDIA H100", "9.0", 80 * GIB, 79 * GIB)
DRIVER_12 = Driver("550.1", "12.4", [H100])
DRIVER_13 = Driver("580.2", "13.0", [H100])
LIBRARIES = [Library(name, "1.0") for name in ("CuPy", "NVRTC", "CUDA headers", "cuBLASLt")]
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("driver", "libraries", "packages", "problem"),
    [
        (DRIVER_12, LIBRARIES, ["cupy-cuda12x"], ""),
        (DRIVER_13, LIBRARIES, ["cupy-cuda12x"], ""),
        (DRIVER_12, [*LIBRARIES, Library("NCCL", missing="no such file")], ["cupy-cuda12x"], ""),
        (
            DRIVER_12,
            [Library("CuPy", missing="x")],
            [],
            "CuPy cannot be loaded: python -m pip install 'cupy-engine[cuda12]'",
        ),
        (
            DRIVER_13,
            [Library("NVRTC", missing="x")],
            [],
            "NVRTC cannot be loaded: python -m pip install 'cupy-engine[cuda13]'",
        ),
        (DRIVER_12, LIBRARIES, ["cupy-cuda13x"], "cupy-cuda13x needs a driver for CUDA 13, this one runs 12.4"),
        (
            DRIVER_13,
            LIBRARIES,
            ["cupy-cuda12x", "cupy"],
            "cupy-cuda12x, cupy break each other: python -m pip uninstall",
        ),
        (Driver("470.1", "11.4", [H100]), LIBRARIES, ["cupy-cuda12x"], "the driver runs CUDA 11.4: update it"),
        (
            Driver("550.1", "12.4", [Gpu(1, "Tesla T4", "7.5", 16 * GIB, 16 * GIB)]),
            LIBRARIES,
            ["cupy-cuda12x"],
            "GPU 1 (Tesla T4) has compute capability 7.5: the kernels need 8.0",
        ),
    ],
)
def test_problems(driver: Driver, libraries: list[Library], packages: list[str], problem: str) -> None:
    found = find_problems(driver, libraries, packages)
    assert len(found) == bool(problem)
    assert not problem or found[0].startswith(problem)


def test_a_driver_whose_gpus_cupy_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "nvidia_driver", lambda: DRIVER_12)
    monkeypatch.setattr(diagnosis, "cuda_libraries", lambda: LIBRARIES)
    monkeypatch.setattr(diagnosis, "cupy_packages", lambda: ["cupy-cuda12x"])
    monkeypatch.setattr(diagnosis, "why_no_cuda", lambda: "CuPy finds no usable NVIDIA GPU")
    found = diagnose()
    assert found.problems == ["CuPy finds no usable NVIDIA GPU, though the driver lists 1: check CUDA_VISIBLE_DEVICES"]
    assert not found.is_fine


def test_a_model_is_planned_for_what_is_there() -> None:
    config = EngineConfig(max_num_seqs=4)
    [cpu] = plan_model(LLAMA, config, [], None)
    [gpu] = plan_model(LLAMA, config, [H100], None)
    [forced] = plan_model(LLAMA, EngineConfig(device="cpu"), [H100], None)
    [imagined] = plan_model(LLAMA, config, [H100], 24 * GIB)
    assert (cpu.place, cpu.dtype, forced.place) == ("CPU (NumPy)", "float32", "CPU (NumPy)")
    assert (gpu.place, gpu.dtype, gpu.memory_bytes) == ("GPU 0 (NVIDIA H100)", "bfloat16", 80 * GIB)
    assert (imagined.place, imagined.memory_bytes) == ("a GPU with 24 GiB", 24 * GIB)
    assert cpu.weight_bytes == 2 * gpu.weight_bytes > 0
    assert cpu.num_kv_blocks == gpu.num_kv_blocks > 0


def test_what_others_use_is_not_ours() -> None:
    busy = Gpu(0, "NVIDIA H100", "9.0", 80 * GIB, GIB // 4)
    [forecast] = plan_model(LLAMA, EngineConfig(), [busy], None)
    assert forecast.problem.startswith(
        "gpu_memory_utilization: 0 MiB are left for the KV cache beside weights of 0 MiB"
    )
    assert 0 < forecast.needed_bytes < 2 * GIB


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Diagnosis("0", "Python", Cpu(2, 8 * GIB, 4 * GIB), Driver(error="no NVIDIA driver"), LIBRARIES, [])
    monkeypatch.setattr("cupy_engine.server.doctor.diagnose", lambda: found)


def test_in_words(without_gpu: None, capsys: Captured) -> None:
    assert main(["doctor", "--model", LLAMA]) == 0
    out = capsys.readouterr().out
    for line in ("CPU: 2 cores, 4.0 GiB of 8.0 GiB free", "GPU: none (no NVIDIA driver)", "CuPy: 1.0"):
        assert line in out
    assert f"{LLAMA} on CPU (NumPy), float32:\n  weights 0.0 GiB" in out
    assert out.endswith("the engine computes on the CPU\n")


def test_a_gpu_that_is_too_small(without_gpu: None, capsys: Captured) -> None:
    assert main(["doctor", "--model", LLAMA, "--gpu-memory-gib", "0.5"]) == 1
    out = capsys.readouterr().out
    assert "on a GPU with 0.5 GiB" in out
    assert "does not fit: gpu_memory_utilization: 0 MiB are left" in out
    assert "one request of the longest context needs 0." in out


def test_as_json(without_gpu: None, capsys: Captured) -> None:
    assert main(["doctor", "--json", "--model", LLAMA, "--gpu-memory-gib", "80", "--max-num-seqs", "8"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["driver"]["error"] == "no NVIDIA driver"
    assert found["memory"][0]["num_kv_blocks"] == 8 * found["memory"][0]["max_model_len"] // 16


def test_this_machine(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]["num_cores"] > 0
    assert 0 < found["cpu"]["available_bytes"] <= found["cpu"]["memory_bytes"]
    assert found["libraries"][0]["name"] == "CuPy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--model", LLAMA, "--max-model-len", "100000000"], "max_model_len: 100000000 is more than the model's"),
        (["--model", LLAMA, "--gpu-memory-utilization", "2"], "gpu_memory_utilization: must be above 0"),
        (["--compile", "--arch", "sm_70"], "arch: must be among sm_80, sm_89, sm_90a, got sm_70"),
    ],
)
def test_errors_are_one_line(without_gpu: None, arguments: list[str], words: str, capsys: Captured) -> None:
    assert main(["doctor", *arguments]) == 1
    assert words in capsys.readouterr().err


def fake_kernels(monkeypatch: pytest.MonkeyPatch, spill_bytes: int, error: str = "") -> None:
    """Every file has one kernel."""

    def compiled(jobs: list[tuple[str, str]]) -> list[CompiledFile]:
        return [
            CompiledFile(file, arch, [CompiledKernel(file, "k", arch, 40, spill_bytes, 0, error)])
            for file, arch in jobs
        ]

    monkeypatch.setattr(kernel_check, "compile_all", compiled)


def test_kernels_that_are_well(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    fake_kernels(monkeypatch, 8)
    assert main(["doctor", "--compile", "--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["activation.cu", "sm_80", "1"]
    assert lines[-1].endswith("kernels compile and stay within their registers")


@pytest.mark.parametrize(
    ("spill_bytes", "error", "fault"),
    [
        (1000, "", "norm.cu sm_80 k: spills 1000 bytes"),
        (0, "x.cu(1): error: no", "norm.cu sm_80 k: does not compile: x.cu"),
    ],
)
def test_kernels_that_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, spill_bytes: int, error: str, fault: str
) -> None:
    fake_kernels(monkeypatch, spill_bytes, error)
    assert main(["doctor", "--compile", "--arch", "sm_80"]) == 1
    assert f"fault: {fault}" in capsys.readouterr().out
    assert main(["doctor", "--compile", "--arch", "sm_80", "--json"]) == 1
    reports = json.loads(capsys.readouterr().out)
    assert {kernel["spill_bytes"] for report in reports for kernel in report["kernels"]} == {spill_bytes}
