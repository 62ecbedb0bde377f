"""How busy and how full GPUs are, as the driver tells it (NVML, extra ``cuda12`` or ``cuda13``)."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuUse:
    """``name`` is the PCI bus id; ``utilization`` the share of recent time in which a kernel ran, 0 to 1."""

    name: str
    utilization: float
    memory_used_bytes: int


class GpuMonitor:
    """Asks NVML, if it is there; opened at the first question, so that it survives a fork. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._is_missing = False

    def read(self, pci_bus_ids: Iterable[str]) -> list[GpuUse]:
        """One entry per GPU that answers."""
        with self._lock:
            nvml = self._open() if pci_bus_ids else None
            return [use for gpu in pci_bus_ids if (use := self._read_one(nvml, gpu))] if nvml else []

    def _open(self) -> Any:
        if self._nvml is None and not self._is_missing:
            try:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
            except Exception as error:  # not installed, or no driver: then there is nothing to tell
                logger.info("GPU utilization is not measured: %s", error)
                self._is_missing = True
        return self._nvml

    def _read_one(self, nvml: Any, pci_bus_id: str) -> GpuUse | None:
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode())
            percent = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            return GpuUse(pci_bus_id, percent / 100, int(nvml.nvmlDeviceGetMemoryInfo(handle).used))
        return None
