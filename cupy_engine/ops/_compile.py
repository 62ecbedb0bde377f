"""Kernels to launch: CUDA C++ from ``kernels/``, compiled by NVRTC on first use.

    kernel("norm.cu", "norm<bf16, 8, 1, true, false>")  ──▶  CuPy's disk cache or NVRTC  ──▶  something to launch

Every instantiation the engine can ask for is listed in :mod:`cupy_engine.ops._instantiations`, so that
:mod:`cupy_engine.ops._compile_report` can build them all on a machine without a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from pathlib import Path
from typing import Any

from cupy_engine.kernel_cache import keep_in_memory
from cupy_engine.ops._instantiations import INSTANTIATIONS

COMPILE_OPTIONS = ("-std=c++17",)
_DEFAULT_SHARED_BYTES = 48 << 10  # what a launch may ask for without saying so before


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

    options = (*COMPILE_OPTIONS, *source_options(), *_arch_options(int(cupy.cuda.Device().compute_capability)))

    def build() -> Any:
        module = cupy.RawModule(code=source(file), options=options, name_expressions=(expression,))
        return module.get_function(expression)

    try:
        function = build()
    except OSError:  # the disk has filled up since the start
        keep_in_memory()
        function = build()
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function


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


def source_options() -> tuple[str, ...]:
    """Where headers are, and the digest that makes an edited one compile anew."""
    return (f"-I{kernels_folder()}", f"-DKERNELS_DIGEST=0x{kernels_digest()}")


def source(file: str) -> str:
    """The program that NVRTC gets for a file in ``kernels/``."""
    return f'#include "{file}"\n'


def _arch_options(compute_capability: int) -> tuple[str, ...]:
    # wgmma and setmaxnreg exist only in the architecture-specific target; CuPy itself asks for plain sm_90.
    return ("-arch=sm_90a",) if compute_capability == 90 else ()
