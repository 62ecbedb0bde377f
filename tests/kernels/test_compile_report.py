"""Every kernel instantiation compiles to machine code for every architecture, on any machine with NVRTC."""

from __future__ import annotations

from pathlib import Path

import pytest

from cupy_engine.ops import _compile
from cupy_engine.ops._instantiations import ARCHITECTURES_OF, INSTANTIATIONS

# Spilled registers cost memory traffic: a few bytes are harmless, and the prefill kernel of head size 128 keeps some
# addresses in local memory, read once per 64 keys.
DEFAULT_SPILL_BUDGET_BYTES = 16
SPILL_BUDGET_BYTES = {"attention_prefill.cu": 256}


@pytest.fixture(autouse=True)
def _needs_nvrtc() -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    pytest.importorskip("cuda.pathfinder", reason="the CUDA extra is not installed")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed: {error}")


@pytest.mark.parametrize("arch", _compile.ARCHITECTURES)
@pytest.mark.parametrize("file", sorted(INSTANTIATIONS))
def test_instantiations_compile_and_stay_in_registers(file: str, arch: str) -> None:
    report = _compile.compile_report([arch], [file])
    if arch not in ARCHITECTURES_OF.get(file, (arch,)):
        assert report == []
        return
    assert [result.error for result in report if result.error] == []
    assert sorted(result.kernel for result in report) == sorted(INSTANTIATIONS[file])
    assert all(result.registers > 0 for result in report)
    budget = SPILL_BUDGET_BYTES.get(file, DEFAULT_SPILL_BUDGET_BYTES)
    spilling = {r.kernel: r.spill_bytes for r in report if r.spill_bytes > budget}
    assert spilling == {}


def test_a_file_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INSTANTIATIONS, "norm.cu", ("norm<no_such_type, 1, 1, false, false>",))
    (result,) = _compile.compile_report(["sm_80"], ["norm.cu"])
    assert "no_such_type" in result.error


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
