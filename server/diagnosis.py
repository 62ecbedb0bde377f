"""What ``cupy-engine doctor`` finds: this machine, what is wrong with it, and how a model would fit."""

from __future__ import annotations

import msgspec

from cupy_engine import __version__
from cupy_engine.config import EngineConfig
from cupy_engine.cuda_device import why_no_cuda
from cupy_engine.model_source import load_model_config, resolve_model

from .machine import (
    Cpu,
    Driver,
    Gpu,
    Library,
    cuda_libraries,
    cupy_packages,
    host_cpu,
    nvidia_driver,
    python_description,
)
from .memory_forecast import MemoryForecast, forecast_cpu, forecast_gpu

_OLDEST_CAPABILITY = (8, 0)
_OLDEST_CUDA = 12
_OPTIONAL = ("NCCL",)  # for several GPUs


class Diagnosis(msgspec.Struct):
    """Everything the doctor can tell. ``problems`` keep the GPUs from being used; each says the way out."""

    version: str
    python: str
    cpu: Cpu
    driver: Driver
    libraries: list[Library]
    problems: list[str]
    model: str = ""
    memory: list[MemoryForecast] = []

    @property
    def is_fine(self) -> bool:
        return not self.problems and not any(forecast.problem for forecast in self.memory)


def diagnose() -> Diagnosis:
    """Look at this machine."""
    driver, libraries = nvidia_driver(), cuda_libraries()
    problems = find_problems(driver, libraries, cupy_packages()) if driver.version else []
    if driver.gpus and not problems and (reason := why_no_cuda()):
        problems.append(f"{reason}, though the driver lists {len(driver.gpus)}: check CUDA_VISIBLE_DEVICES")
    return Diagnosis(__version__, python_description(), host_cpu(), driver, libraries, problems)


def find_problems(driver: Driver, libraries: list[Library], packages: list[str]) -> list[str]:
    """What keeps the engine from using the GPUs of a machine that has a driver."""
    major = int(driver.cuda_version.split(".")[0])
    extra = f"python -m pip install 'cupy-engine[cuda{min(max(major, 12), 13)}]'"
    problems = [
        f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.compute_capability}: the kernels need 8.0 (Ampere)"
        for gpu in driver.gpus
        if tuple(map(int, gpu.compute_capability.split("."))) < _OLDEST_CAPABILITY
    ]
    if major < _OLDEST_CUDA:
        problems.append(
            f"the driver runs CUDA {driver.cuda_version}: update it to one for CUDA {_OLDEST_CUDA} or newer"
        )
    if len(packages) > 1:
        problems.append(
            f"{', '.join(packages)} break each other: python -m pip uninstall {' '.join(packages)}; {extra}"
        )
    if major == _OLDEST_CUDA and "cupy-cuda13x" in packages:
        problems.append(f"cupy-cuda13x needs a driver for CUDA 13, this one runs {driver.cuda_version}: {extra}")
    missing = [library.name for library in libraries if library.missing and library.name not in _OPTIONAL]
    if missing:
        problems.append(f"{', '.join(missing)} cannot be loaded: {extra}")
    return problems


def plan_model(model: str, config: EngineConfig, gpus: list[Gpu], gpu_memory_bytes: int | None) -> list[MemoryForecast]:
    """How a model would fit: into a GPU of a size, else each GPU of this machine, else its CPU.

    Raises:
        ModelLoadError: there is no such model.
        ConfigError: an option asks for more than the model has.
    """
    model_config = load_model_config(resolve_model(model))
    if gpu_memory_bytes is not None:
        name = f"a GPU with {gpu_memory_bytes / (1 << 30):g} GiB"
        return [forecast_gpu(config, model_config, name, gpu_memory_bytes)]
    if gpus and config.device != "cpu":
        return [
            forecast_gpu(config, model_config, f"GPU {gpu.index} ({gpu.name})", gpu.memory_bytes, gpu.free_bytes)
            for gpu in gpus
        ]
    return [forecast_cpu(config, model_config)]
