"""One NVIDIA GPU through CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.errors import ConfigError


class CudaDevice:
    """A GPU, the stream on which its steps run, and its memory.

    Args:
        index: which GPU.

    Raises:
        ConfigError: CuPy is not installed, or finds no GPU; says what to install.
    """

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        reason = why_no_cuda()
        if reason is not None:
            raise ConfigError("device", f"{reason}; install 'cupy-engine[cuda12]' or [cuda13], or use device='cpu'")
        import cupy

        self.xp = cupy
        self.index = index
        self._device = cupy.cuda.Device(index)
        self._device.use()
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def use(self) -> Any:
        """A context in which this thread's launches and copies go to this GPU's stream."""
        self._device.use()
        return self.stream

    @property
    def description(self) -> str:
        properties = self.xp.cuda.runtime.getDeviceProperties(self.index)
        return str(properties["name"].decode())

    @property
    def pci_bus_id(self) -> str:
        return str(self._device.pci_bus_id)

    def asarray(self, host: np.ndarray, dtype: Any = None) -> Array:
        """Copy to the GPU, C-ordered; the conversion to ``dtype`` happens there."""
        array = self.xp.asarray(host)
        return self.xp.ascontiguousarray(array, host.dtype if dtype is None else dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.xp.empty(shape, dtype)

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Page-locked memory."""
        import cupyx

        zeros: np.ndarray = cupyx.zeros_pinned(shape, dtype)
        return zeros

    def to_host(self, array: Array) -> np.ndarray:
        return np.asarray(self.xp.asnumpy(array))

    def free_memory_bytes(self) -> int:
        """Memory that the driver could still hand out."""
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def total_memory_bytes(self) -> int:
        return int(self.xp.cuda.runtime.memGetInfo()[1])


def why_no_cuda() -> str | None:
    """Why the CUDA backend cannot run here; ``None`` if it can."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    if not cupy.cuda.is_available():
        return "CuPy finds no usable NVIDIA GPU"
    return None
