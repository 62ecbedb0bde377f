"""How much of the time the GPU has a step to work on.

    GPU    | step n | gap | step n+1 | gap | …       busy = all but the gaps

A step's events lie on the engine's stream: one behind the copy of its integers, just before its first kernel, and one
behind its last. Where the GPU waits for the host in the midst of a step (one with prompts is launched kernel by
kernel), events call that busy. NVML samples whether any kernel runs, and so sees such waits if they are long. Both are
shown.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

from cupy_engine.server.gpu_monitor import GpuMonitor

from cupy_engine import Engine
from cupy_engine.core import EngineCore
from cupy_engine.errors import ConfigError

from .host_clock import HostClock
from .replaced import replaced
from .report import Figures

_NVML_PERIOD_S = 0.05


def require_gpu(engine: Engine) -> None:
    """Raises ConfigError for an engine on the CPU."""
    if not engine.info.gpu_ids:
        raise ConfigError("gpu_busy", f"is measured on a GPU, and the engine runs on {engine.info.backend}")


@contextmanager
def busy_figures(engine: Engine) -> Iterator[Figures]:
    """A dict that is filled, when the context ends, with what was seen during it."""
    figures: Figures = {}
    core = engine._core
    with (
        HostClock.watching(core) as host,
        GpuClock.watching(core) as gpu,
        _nvml_samples(engine.info.gpu_ids) as samples,
    ):
        yield figures
    figures |= host.figures()
    figures["gpu_busy_events"] = gpu.busy_share()
    if samples:
        figures["gpu_busy_nvml"] = mean(samples)


class GpuClock:
    """Events around every step, on the stream on which the steps run."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    @classmethod
    @contextmanager
    def watching(cls, core: EngineCore) -> Iterator[GpuClock]:
        """A clock around the worker's steps, as long as the context lasts."""
        import cupy

        clock: GpuClock = cls()
        worker: Any = core._executor
        upload, finish, stream = worker._buffers.upload, worker._finish, worker._device.stream
        starts: list[Any] = []

        def marked_upload(*arguments: Any) -> None:
            upload(*arguments)
            starts.append(cupy.cuda.Event())
            starts[-1].record(stream)

        def marked_finish(*arguments: Any) -> Any:
            end = cupy.cuda.Event()
            end.record(stream)
            clock._spans += [(start, end) for start in starts]
            starts.clear()
            return finish(*arguments)

        with replaced(worker._buffers, "upload", marked_upload), replaced(worker, "_finish", marked_finish):
            yield clock
        stream.synchronize()

    def busy_share(self) -> float:
        """Of the time from the first step's start to the last one's end."""
        from cupy.cuda import get_elapsed_time

        busy_ms = sum(get_elapsed_time(start, end) for start, end in self._spans)
        return float(busy_ms / get_elapsed_time(self._spans[0][0], self._spans[-1][1]))


@contextmanager
def _nvml_samples(gpu_ids: tuple[str, ...]) -> Iterator[list[float]]:
    """Utilization as the driver tells it, sampled while the context lasts; empty where it tells nothing."""
    samples: list[float] = []
    monitor, is_over = GpuMonitor(), threading.Event()

    def sample() -> None:
        while not is_over.wait(_NVML_PERIOD_S):
            samples.extend(use.utilization for use in monitor.read(gpu_ids))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()
