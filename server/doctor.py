"""``cupy-engine doctor``: what this machine has for the engine, what is missing, what of a model would fit."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

import msgspec

from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError

from .diagnosis import Diagnosis, diagnose, plan_model
from .machine import Driver
from .memory_forecast import MemoryForecast
from .options import chosen

_GIB = 1 << 30
_MOST_GIB = 1 << 20


def doctor(arguments: Namespace) -> int:
    """The command; its exit status: 1 if anything is wrong."""
    if arguments.compile:
        from .kernel_check import check_kernels

        return check_kernels(arguments.arch, arguments.json)
    if arguments.arch:
        raise ConfigError("arch", "goes with --compile")
    diagnosis = diagnose()
    if arguments.model is not None or arguments.gpu_memory_gib is not None:
        size = _gpu_bytes(arguments.gpu_memory_gib)
        config = EngineConfig(**chosen(arguments, EngineConfig) | {"model": arguments.model or EngineConfig.model})
        diagnosis.model = config.model
        diagnosis.memory = plan_model(config.model, config, diagnosis.driver.gpus, size)
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(diagnosis).decode() + "\n")
    else:
        sys.stdout.write("\n".join(_lines(diagnosis)) + "\n")
    return 0 if diagnosis.is_fine else 1


def _gpu_bytes(gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib <= _MOST_GIB:
        raise ConfigError("gpu_memory_gib", f"must be above 0 and at most {_MOST_GIB}, got {gib:g}")
    return int(gib * _GIB)


def _lines(found: Diagnosis) -> Iterator[str]:
    cpu = found.cpu
    yield f"cupy-engine {found.version}, {found.python}"
    yield f"CPU: {cpu.num_cores} cores, {_gib(cpu.available_bytes)} of {_gib(cpu.memory_bytes)} free"
    yield from _driver_lines(found.driver)
    for library in found.libraries:
        yield f"{library.name}: {library.version or f'missing ({library.missing})'}"
    for forecast in found.memory:
        yield from _forecast_lines(found.model, forecast)
    for problem in found.problems:
        yield f"problem: {problem}"
    if not found.driver.gpus:
        yield "the engine computes on the CPU"
    elif not found.problems:
        yield "the engine computes on the GPU"


def _driver_lines(driver: Driver) -> Iterator[str]:
    if driver.error:
        yield f"GPU: none ({driver.error})"
        return
    yield f"NVIDIA driver: {driver.version}, for CUDA up to {driver.cuda_version}"
    for gpu in driver.gpus:
        free = f"{_gib(gpu.free_bytes)} of {_gib(gpu.memory_bytes)} free"
        yield f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, {free}"


def _forecast_lines(model: str, forecast: MemoryForecast) -> Iterator[str]:
    yield f"{model} on {forecast.place}, {forecast.dtype}:"
    yield f"  weights {_gib(forecast.weight_bytes)}, workspace about {_gib(forecast.workspace_bytes)}"
    if forecast.problem:
        yield f"  does not fit: {forecast.problem}"
        yield f"  one request of the longest context needs {_gib(forecast.needed_bytes)} of memory"
        return
    num_tokens = forecast.num_kv_blocks * forecast.block_size
    yield (
        f"  KV cache {_gib(forecast.kv_cache_bytes)} = {forecast.num_kv_blocks} blocks of {forecast.block_size} "
        f"({num_tokens} tokens), up to {forecast.max_model_len} tokens a request"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
