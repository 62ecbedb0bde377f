"""One NVIDIA GPU through CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.errors import ConfigError
from cupy_engine.kernel_cache import prepare_kernel_cache
from cupy_engine.pinned_uploads import PinnedUploads


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
        self._uploads: PinnedUploads | None = None

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
        with self.use():
            array = self.xp.asarray(host)
            return self.xp.ascontiguousarray(array, host.dtype if dtype is None else dtype)

    def stack(self, parts: Sequence[Array], dtype: Any) -> Array:
        """Host arrays go through pinned buffers, piece by piece, until :meth:`end_loading`."""
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        with self.use():
            stacked = self.xp.empty(shape, dtype)
            first = 0
            for part in parts:
                rows = stacked[first : first + len(part)]
                if isinstance(part, np.ndarray):
                    self._uploads = self._uploads or PinnedUploads(self.stream)
                    self._uploads.copy(part, rows)
                else:
                    rows[...] = part
                first += len(part)
        return stacked

    def end_loading(self) -> None:
        """All weights are stacked: wait for them and release what carried them."""
        if self._uploads is not None:
            self._uploads.close()
            self._uploads = None
        self.stream.synchronize()

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
    prepare_kernel_cache()
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    if not cupy.cuda.is_available():
        return "CuPy finds no usable NVIDIA GPU"
    return None
