"""``cupy-engine doctor --compile``: every kernel as machine code for every architecture, on any machine with NVRTC."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec
from tqdm import tqdm

from cupy_engine.errors import ConfigError
from cupy_engine.ops._compile_report import ARCHITECTURES, CompiledFile, compile_all, compile_jobs


def check_kernels(arches: Sequence[str] | None, as_json: bool) -> int:
    """Build, print, and say whether all is well: the exit status.

    Raises:
        ConfigError: an architecture that there are no kernels for.
        EngineError: there is nothing to compile with; says what to install.
    """
    unknown = set(arches or ()) - set(ARCHITECTURES)
    if unknown:
        raise ConfigError("arch", f"must be among {', '.join(ARCHITECTURES)}, got {', '.join(sorted(unknown))}")
    jobs = compile_jobs(arches or ARCHITECTURES)
    bar = tqdm(compile_all(jobs), total=len(jobs), desc="kernels", unit="file", disable=None)
    reports = sorted(bar, key=lambda report: (report.file, report.arch))
    if as_json:
        sys.stdout.write(msgspec.json.encode(reports).decode() + "\n")
    else:
        sys.stdout.write("\n".join([*map(_line, reports), *_verdict(reports)]) + "\n")
    return 1 if any(kernel.fault for report in reports for kernel in report.kernels) else 0


def _line(report: CompiledFile) -> str:
    kernels = report.kernels
    registers, spilled = (max(getattr(k, name) for k in kernels) for name in ("registers", "spill_bytes"))
    budget = kernels[0].spill_budget_bytes
    return (
        f"{report.file:<26} {report.arch:<7} {len(kernels):>3} kernels, up to {registers:>3} registers and "
        f"{spilled} bytes spilled (budget {budget})"
    )


def _verdict(reports: list[CompiledFile]) -> list[str]:
    """A line per fault; one line if there is none."""
    kernels = [kernel for report in reports for kernel in report.kernels]
    faults = [f"fault: {k.file} {k.arch} {k.kernel}: {k.fault}" for k in kernels if k.fault]
    return faults or [f"{len(kernels)} kernels compile and stay within their registers"]
