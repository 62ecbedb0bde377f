"""The only place that compiles: CUDA C++ from ``kernels/`` through NVRTC.

    kernel("norm.cu", "norm<bf16, 8, 1, true, false>")  ──▶  CuPy's disk cache or NVRTC  ──▶  something to launch

Every instantiation the engine can ask for is listed in :mod:`cupy_engine.ops._instantiations`, so that
:func:`compile_report` can build them all on a machine without a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupy_engine.ops._instantiations import ARCHITECTURES_OF, INSTANTIATIONS

_DEFAULT_SHARED_BYTES = 48 << 10  # what a launch may ask for without saying so before
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")


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


@functools.cache
def kernel(file: str, expression: str, shared_bytes: int = 0) -> Any:
    """A kernel for the current device's architecture, compiled on first use and kept on disk.

    Args:
        file: a file in ``kernels/``.
        expression: the kernel's name with its template arguments, one of ``INSTANTIATIONS[file]``.
        shared_bytes: dynamic shared memory that launches may ask for.

    Returns:
        A ``cupy.RawKernel``: ``k(grid, block, arguments, shared_mem=bytes)``.

    Raises:
        cupy.cuda.compiler.CompileException: the file does not compile.
    """
    assert expression in INSTANTIATIONS[file], f"{file}: {expression} is not in INSTANTIATIONS"
    import cupy

    options = (*_options(), *_arch_options(int(cupy.cuda.Device().compute_capability)))
    module = cupy.RawModule(code=_source(file), options=options, name_expressions=(expression,))
    function = module.get_function(expression)
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def compile_report(arches: Iterable[str] = ARCHITECTURES, files: Iterable[str] | None = None) -> list[CompiledKernel]:
    """Build every instantiation to machine code; needs NVRTC and the CUDA runtime headers, but no GPU.

    Args:
        arches: real architectures, ``sm_90a`` for example.
        files: files in ``kernels/``; default all.

    Returns:
        One entry per instantiation and architecture that has it; if a file fails, with the compiler's log in each.
    """
    names = INSTANTIATIONS if files is None else files
    jobs = [(file, arch) for arch in arches for file in names if arch in ARCHITECTURES_OF.get(file, (arch,))]
    return [result for file, arch in jobs for result in _compile_file(file, arch)]


@functools.cache
def kernels_folder() -> Path:
    """The folder of the CUDA sources."""
    return Path(str(importlib.resources.files("cupy_engine.kernels")))


@functools.cache
def kernels_digest() -> str:
    """A digest of all CUDA sources: CuPy's cache key leaves out included files, so this goes into the options."""
    digest = hashlib.sha256()
    folder = kernels_folder()
    for path in sorted([*folder.rglob("*.cu"), *folder.rglob("*.cuh")]):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{kernels_folder()}", f"-DKERNELS_DIGEST=0x{kernels_digest()}")


def _arch_options(compute_capability: int) -> tuple[str, ...]:
    # wgmma and setmaxnreg exist only in the architecture-specific target; CuPy itself asks for plain sm_90.
    return ("-arch=sm_90a",) if compute_capability == 90 else ()


def _source(file: str) -> str:
    return f'#include "{file}"\n'


def _compile_file(file: str, arch: str) -> list[CompiledKernel]:
    from cupy_backends.cuda.libs import nvrtc

    expressions = INSTANTIATIONS[file]
    # CuPy adds the two options after the architecture to whatever it compiles.
    options = (
        *_options(),
        f"-arch={arch}",
        "-ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
        *(f"-I{folder}" for folder in _header_folders()),
    )
    program = nvrtc.createProgram(_source(file), "instantiations.cu", (), ())
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


def _header_folders() -> list[str]:
    from cuda import pathfinder

    folder = pathfinder.find_nvidia_header_directory("cudart")
    return [] if folder is None else [folder]


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
