"""Every kernel instantiation as machine code, on any machine with NVRTC: its registers, and what it spills.

    files × architectures ──threads──▶ NVRTC ──▶ one report each, kept in the cache folder until its sources change

A kernel may spill as many bytes as ``SPILL_BUDGET_BYTES`` in :mod:`cupy_engine.ops._instantiations` allows its file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cupy_engine.cache_folder import cache_folder
from cupy_engine.errors import EngineError
from cupy_engine.ops._compile import COMPILE_OPTIONS, kernels_folder, source, source_options
from cupy_engine.ops._instantiations import (
    ARCHITECTURES_OF,
    DEFAULT_SPILL_BUDGET_BYTES,
    INSTANTIATIONS,
    SPILL_BUDGET_BYTES,
)

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
# CuPy adds the last two to whatever it compiles.
_OPTIONS = (*COMPILE_OPTIONS, "--ptxas-options=-v", "-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler says about one kernel instantiation; ``error`` is empty if it compiled."""

    file: str
    kernel: str
    arch: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0  # static; dynamic shared memory is chosen at launch
    error: str = ""

    @property
    def spill_budget_bytes(self) -> int:
        return SPILL_BUDGET_BYTES.get(self.file, DEFAULT_SPILL_BUDGET_BYTES)

    @property
    def fault(self) -> str:
        """What is wrong with it in one line; empty if nothing is."""
        if self.error:
            first_line = next((line for line in self.error.splitlines() if "error" in line), self.error.splitlines()[0])
            return f"does not compile: {first_line}"
        if self.spill_bytes > self.spill_budget_bytes:
            return f"spills {self.spill_bytes} bytes, its budget is {self.spill_budget_bytes}"
        return ""


@dataclass(frozen=True)
class CompiledFile:
    """One file for one architecture."""

    file: str
    arch: str
    kernels: list[CompiledKernel]


def compile_jobs(arches: Iterable[str] = ARCHITECTURES, files: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """(file, architecture) pairs to build; files that need one architecture come with that one only.

    Args:
        arches: real architectures, ``sm_90a`` for example.
        files: files in ``kernels/``; default all.
    """
    names = list(INSTANTIATIONS if files is None else files)
    return [(file, arch) for file in names for arch in arches if arch in ARCHITECTURES_OF.get(file, (arch,))]


def compile_all(jobs: Iterable[tuple[str, str]], num_threads: int | None = None) -> Iterator[CompiledFile]:
    """Build (file, architecture) pairs as they get ready; what the cache folder knows comes at once.

    Needs NVRTC and the headers of the CUDA runtime, but no GPU. A file that fails gives one entry per instantiation,
    each with the compiler's log.

    Raises:
        EngineError: CuPy, NVRTC or the headers are missing; says what to install.
    """
    version = _nvrtc_version()
    pool = ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0)))  # NVRTC runs without the interpreter's lock
    try:
        for done in as_completed([pool.submit(_report, file, arch, version) for file, arch in jobs]):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _nvrtc_version() -> str:
    try:
        from cuda import pathfinder
        from cupy_backends.cuda.libs import nvrtc

        version = ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, RuntimeError) as error:
        reason = "CuPy is" if isinstance(error, ImportError) else "NVRTC is"
        raise EngineError(f"kernels cannot be compiled: {reason} not installed; {_WAY_OUT}") from error
    if pathfinder.find_nvidia_header_directory("cudart") is None:
        raise EngineError(f"kernels cannot be compiled: the CUDA runtime's headers are not installed; {_WAY_OUT}")
    return version


_WAY_OUT = "python -m pip install 'cupy-engine[cuda12]' or [cuda13]"


def _report(file: str, arch: str, version: str) -> CompiledFile:
    prefix = f"{file.removesuffix('.cu')}-{arch}-nvrtc{version}-"
    folder = cache_folder() / "compile_reports"
    path = folder / f"{prefix}{_digest(file)}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=CompiledFile)
    except (OSError, msgspec.MsgspecError):
        compiled = CompiledFile(file, arch, compile_file(file, arch))
    if not any(kernel.error for kernel in compiled.kernels):
        with suppress(OSError):  # a full disk or a read-only home: it is compiled again next time
            _keep(compiled, path, prefix)
    return compiled


def _keep(compiled: CompiledFile, path: Path, prefix: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for outdated in path.parent.glob(f"{prefix}*.json"):
        outdated.unlink(missing_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(msgspec.json.encode(compiled))
    os.replace(part, path)


def _digest(file: str) -> str:
    """Of all that decides the outcome but the compiler: the file, every header, instantiations and options."""
    digest = hashlib.sha256(repr((_OPTIONS, INSTANTIATIONS[file])).encode())
    folder = kernels_folder()
    for path in [folder / file, *sorted(folder.rglob("*.cuh"))]:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_file(file: str, arch: str) -> list[CompiledKernel]:
    """Build a file's instantiations for one architecture, whatever the cache folder knows."""
    from cupy_backends.cuda.libs import nvrtc

    expressions = INSTANTIATIONS[file]
    options = (*_OPTIONS, *source_options(), f"-arch={arch}", f"-I{_runtime_headers()}")
    program = nvrtc.createProgram(source(file), "instantiations.cu", (), ())
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        nvrtc.compileProgram(program, options)
        names = {nvrtc.getLoweredName(program, expression): expression for expression in expressions}
        nvrtc.getCUBIN(program)
        return list(_parse_log(nvrtc.getProgramLog(program), names, file, arch))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip() or str(error)
        return [CompiledKernel(file, expression, arch, error=log) for expression in expressions]
    finally:
        nvrtc.destroyProgram(program)


def _runtime_headers() -> Path:
    from cuda import pathfinder

    return Path(pathfinder.find_nvidia_header_directory("cudart"))


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def _parse_log(log: str, names: dict[str, str], file: str, arch: str) -> Iterator[CompiledKernel]:
    for section in re.split(r"(?=ptxas info\s*: Compiling entry function)", log):
        entry = _ENTRY.search(section)
        if entry is None:
            continue
        yield CompiledKernel(
            file,
            names[entry[1]],
            arch,
            registers=_first_number(_REGISTERS, section),
            spill_bytes=sum(int(n) for stores_loads in _SPILL.findall(section) for n in stores_loads),
            shared_bytes=_first_number(_SHARED, section),
        )


def _first_number(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return int(match[1]) if match else 0
