"""What this machine has for the engine to run on: processors, NVIDIA GPUs, CUDA libraries. Nothing here needs a GPU."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import msgspec

CUPY_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")


class Cpu(msgspec.Struct):
    """The host: cores that this process may use, and its memory."""

    num_cores: int
    memory_bytes: int
    available_bytes: int


class Gpu(msgspec.Struct):
    """One NVIDIA GPU as its driver describes it."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    free_bytes: int


class Driver(msgspec.Struct):
    """The NVIDIA driver; ``cuda_version`` is the newest CUDA that it runs. ``error`` says why it lists no GPUs."""

    version: str = ""
    cuda_version: str = ""
    gpus: list[Gpu] = []
    error: str = ""


class Library(msgspec.Struct):
    """A library of the CUDA backend; ``version`` is empty where it is ``missing``."""

    name: str
    version: str = ""
    missing: str = ""

    @property
    def is_found(self) -> bool:
        return not self.missing


def host_cpu() -> Cpu:
    """The processors and memory of this host."""
    with open("/proc/meminfo") as lines:
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return Cpu(len(os.sched_getaffinity(0)), 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"])


def python_description() -> str:
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def nvidia_driver() -> Driver:
    """The driver and all GPUs that it sees, those hidden by ``CUDA_VISIBLE_DEVICES`` included."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver(error="no NVIDIA driver")
    try:
        import pynvml as nvml
    except ImportError:
        return Driver(error="the GPUs cannot be listed: nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        gpus = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        return Driver(_text(nvml.nvmlSystemGetDriverVersion()), f"{number // 1000}.{number % 1000 // 10}", gpus)
    except nvml.NVMLError as error:
        return Driver(error=f"the NVIDIA driver does not answer: {error}")


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    capability = f"{major}.{minor}"
    usable = memory.total - memory.reserved  # as CUDA counts
    return Gpu(index, _text(nvml.nvmlDeviceGetName(handle)), capability, usable, memory.free)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def cupy_packages() -> list[str]:
    """Installed distributions that bring CuPy; more than one break each other."""
    return [name for name in CUPY_PACKAGES if _version_of(name)]


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def cuda_libraries() -> list[Library]:
    """What the CUDA backend loads, in the order in which it needs it."""
    probes: dict[str, Callable[[], str]] = {
        "CuPy": _cupy,
        "NVRTC": _nvrtc,
        "CUDA headers": _headers,
        "cuBLASLt": _cublaslt,
        "NCCL": _nccl,
    }
    return [_probe(name, probe) for name, probe in probes.items()]


def _probe(name: str, probe: Callable[[], str]) -> Library:
    try:
        return Library(name, probe())
    except Exception as error:  # a broken installation fails in many ways, and each is what the user wants to know
        return Library(name, missing=str(error).strip().splitlines()[0] if str(error).strip() else repr(error))


def _cupy() -> str:
    import cupy

    return f"{cupy.__version__} ({', '.join(cupy_packages()) or 'built from source'})"


def _nvrtc() -> str:
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def _headers() -> str:
    from cuda import pathfinder

    folder = pathfinder.find_nvidia_header_directory("cudart")
    if folder is None:
        raise FileNotFoundError("the CUDA runtime's headers are not installed")
    return str(folder)


def _cublaslt() -> str:
    version = _load("cublasLt").cublasLtGetVersion
    version.restype = ctypes.c_size_t
    return _dotted(version())


def _nccl() -> str:
    number = ctypes.c_int()
    _load("nccl").ncclGetVersion(ctypes.byref(number))
    return _dotted(number.value)


def _load(name: str) -> ctypes.CDLL:
    from cuda import pathfinder

    return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib(name).abs_path)


def _dotted(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
