"""Every kernel instantiation compiles to machine code for every architecture, on any machine with NVRTC."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cupy_engine.errors import EngineError
from cupy_engine.ops import _compile, _compile_report
from cupy_engine.ops._compile_report import ARCHITECTURES, CompiledFile, CompiledKernel, compile_all, compile_jobs
from cupy_engine.ops._instantiations import ARCHITECTURES_OF, INSTANTIATIONS, SPILL_BUDGET_BYTES

HOPPER_ONLY = "attention_prefill_sm90.cu"


@pytest.fixture(scope="module")
def needs_nvrtc() -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    pytest.importorskip("cuda.pathfinder", reason="the CUDA extra is not installed")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed: {error}")


@pytest.fixture(scope="module")
def reports(needs_nvrtc: None) -> dict[tuple[str, str], CompiledFile]:
    """All of them, built in parallel or taken from the cache folder."""
    return {(report.file, report.arch): report for report in compile_all(compile_jobs())}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("file", "arch"), compile_jobs())
def test_instantiations_compile_and_stay_in_registers(
    reports: dict[tuple[str, str], CompiledFile], file: str, arch: str
) -> None:
    kernels = reports[file, arch].kernels
    assert [kernel.error for kernel in kernels if kernel.error] == []
    assert sorted(kernel.kernel for kernel in kernels) == sorted(INSTANTIATIONS[file])
    assert all(kernel.registers > 0 for kernel in kernels)
    assert {kernel.kernel: kernel.fault for kernel in kernels if kernel.fault} == {}


def test_every_file_is_built_for_every_architecture_that_has_it() -> None:
    jobs = compile_jobs()
    assert {file for file, _ in jobs} == set(INSTANTIATIONS)
    assert [arch for file, arch in jobs if file == "norm.cu"] == list(ARCHITECTURES)
    assert [arch for file, arch in jobs if file == HOPPER_ONLY] == list(ARCHITECTURES_OF[HOPPER_ONLY])
    assert compile_jobs(["sm_80"], [HOPPER_ONLY, "rope.cu"]) == [("rope.cu", "sm_80")]


def test_a_file_that_does_not_compile_is_reported_and_not_kept(
    needs_nvrtc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUPY_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setitem(INSTANTIATIONS, "rope.cu", ("rope_and_write_kv<no_such_type, 1>",))
    (report,) = compile_all([("rope.cu", "sm_80")])
    (kernel,) = report.kernels
    assert "no_such_type" in kernel.error
    assert kernel.fault.startswith("does not compile: ")
    assert list(tmp_path.rglob("*.json")) == []


def test_reports_are_kept_until_a_source_changes(
    needs_nvrtc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUPY_ENGINE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "own.cuh").write_text("__global__ void own(float* x) { *x = 1.0f; }")
    (folder / "own.cu").write_text('#include "own.cuh"')
    monkeypatch.setattr(_compile, "kernels_folder", lambda: folder)
    monkeypatch.setattr(_compile_report, "kernels_folder", lambda: folder)
    monkeypatch.setitem(INSTANTIATIONS, "own.cu", ("own",))
    (first,) = compile_all([("own.cu", "sm_90a")])
    assert [kernel.fault for kernel in first.kernels] == [""]

    with monkeypatch.context() as broken:
        broken.setattr(_compile_report, "compile_file", lambda file, arch: pytest.fail("compiled again"))
        assert list(compile_all([("own.cu", "sm_90a")])) == [first]
    (folder / "own.cuh").write_text("__global__ void own(float* x) { *x = y; }")
    (second,) = compile_all([("own.cu", "sm_90a")])
    assert '"y" is undefined' in second.kernels[0].fault


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (CompiledKernel("norm.cu", "norm<float>", "sm_80", spill_bytes=16), ""),
        (CompiledKernel("norm.cu", "norm<float>", "sm_80", spill_bytes=24), "spills 24 bytes, its budget is 16"),
        (CompiledKernel("attention_prefill.cu", "k", "sm_80", spill_bytes=256), ""),
        (
            CompiledKernel("norm.cu", "k", "sm_80", error="note\nx.cu(1): error: no\nmore"),
            "not compile: x.cu(1): error",
        ),
    ],
)
def test_faults(kernel: CompiledKernel, fault: str) -> None:
    assert (fault in kernel.fault) if fault else kernel.fault == ""


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(EngineError, match=r"CuPy is not installed; python -m pip install 'cupy-engine\[cuda12\]'"):
        list(compile_all([("rope.cu", "sm_80")]))


def test_budgets_are_of_files_that_exist() -> None:
    assert set(SPILL_BUDGET_BYTES) <= set(INSTANTIATIONS)


def test_every_kernel_file_is_listed() -> None:
    assert {path.name for path in _compile.kernels_folder().glob("*.cu")} == set(INSTANTIATIONS)


def test_the_digest_covers_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    monkeypatch.setattr(_compile, "kernels_folder", lambda: tmp_path)
    (tmp_path / "common").mkdir()
    for text in ("a", "b"):
        (tmp_path / "common" / "x.cuh").write_text(text)
        digests.add(_compile.kernels_digest.__wrapped__())
    assert len(digests) == 2
