"""A home that cannot be written and a full disk leave CuPy a place for its kernels."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = """
import os
{before}
from cupy_engine.kernel_cache import prepare_kernel_cache
prepare_kernel_cache()
folder = os.environ.get("CUPY_CACHE_DIR", "default")
names = sorted(os.listdir(folder)) if folder not in ("default", "/") else []
print(folder, os.environ.get("CUPY_CACHE_IN_MEMORY"), names)
{after}
"""
UNWRITABLE = "/proc/no-such-home"  # even for root


def run(home: str | Path, before: str = "", after: str = "", **variables: str) -> tuple[str, str]:
    """What a new process finds, and its standard error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUPY_")}
    process = subprocess.run(
        [sys.executable, "-c", REPORT.format(before=before, after=after)],
        env=environment | {"HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.strip(), process.stderr


def test_a_usual_home_is_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path) == ("default None []", "")
    assert run(UNWRITABLE, CUPY_CACHE_DIR=str(tmp_path / "own"))[0] == f"{tmp_path}/own None []"


def test_an_unwritable_home(tmp_path: Path) -> None:
    out, err = run(UNWRITABLE, TMPDIR=str(tmp_path))
    assert out.startswith(f"{tmp_path}/cupy-engine-kernels-")
    assert out.endswith(" None []")
    assert f"compiled kernels cannot be kept in {UNWRITABLE}/.cupy/kernel_cache" in err
    assert list(tmp_path.iterdir()) == []  # removed at the end


def test_kernels_in_an_unwritable_folder_are_used(tmp_path: Path) -> None:
    """As in an image whose file system is read-only but for a temporary folder."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "known.cubin").write_bytes(b"machine code")
    before = (
        "from cupy_engine import kernel_cache as k\n"
        f"real = k._why_not_writable\nk._why_not_writable = lambda f: 'full' if str(f) == {str(folder)!r} else real(f)"
    )
    after = "print(open(folder + '/known.cubin').read())"
    out, _ = run(tmp_path, before, after, CUPY_CACHE_DIR=str(folder))
    assert out.splitlines()[0].endswith("None ['known.cubin']")
    assert out.splitlines()[1] == "machine code"


def test_a_full_disk(tmp_path: Path) -> None:
    """No file may grow beyond 64 KiB: there is room for folders, not for kernels."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}))"
    out, err = run(tmp_path, limit, TMPDIR=str(tmp_path))
    assert out == "/ 1 []"
    assert "cannot be kept" in err


@pytest.mark.parametrize("home", [UNWRITABLE, "/dev/null"])
def test_cupy_imports(home: str) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    _, err = run(home, after="import cupy")
    assert "Traceback" not in err
