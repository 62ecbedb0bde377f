"""One NVIDIA GPU through CuPy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.errors import ConfigError
from cupy_engine.kernel_cache import prepare_kernel_cache
from cupy_engine.pinned_uploads import PinnedUploads

logger = logging.getLogger("cupy_engine")

_SMALL_BYTES = 2 << 20


class CudaDevice:
    """A GPU, the stream on which its steps run, and memory pools of its own: arrays are made within :meth:`use`.

    Small arrays, of which some live long, have a pool to themselves: in that of the large ones they would break up the
    room that a large one needs.

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
        self._others_bytes = _used_bytes(self.pci_bus_id)  # before this engine takes any
        self._device.use()
        self._pool, self._small_pool = cupy.cuda.MemoryPool(), cupy.cuda.MemoryPool()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._uploads: PinnedUploads | None = None

    @contextmanager
    def use(self) -> Iterator[None]:
        """This thread's launches and copies go to this GPU's stream, its arrays come from this device's pools."""
        self._device.use()
        with self.stream, self.xp.cuda.using_allocator(self._allocate):
            yield

    def _allocate(self, num_bytes: int) -> Any:
        return (self._small_pool if num_bytes <= _SMALL_BYTES else self._pool).malloc(num_bytes)

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
            self.xp.get_default_pinned_memory_pool().free_all_blocks()
        self.release_unused()

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

    def own_memory_bytes(self) -> int:
        """Memory taken since this object was made: context, libraries, kernels, arrays, graphs.

        Without NVML, which knows what others had taken before, theirs counts too.
        """
        return self.total_memory_bytes() - self.free_memory_bytes() - self._others_bytes

    def release_unused(self) -> None:
        """Give the pools' free memory back to the driver."""
        self.stream.synchronize()
        self._pool.free_all_blocks()
        self._small_pool.free_all_blocks()

    def limit_growth(self, num_bytes: int) -> None:
        """Let small arrays take no more than this on top of what they have now, large ones nothing.

        Beyond that there is a ``MemoryError``.
        """
        with self._device:
            self._pool.set_limit(size=self._pool.total_bytes())
            self._small_pool.set_limit(size=self._small_pool.total_bytes() + num_bytes)


def _used_bytes(pci_bus_id: str) -> int:
    """Memory of a GPU in use by whomever; 0 if NVML is not there to tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode())
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    except Exception as error:  # not installed, too old, or no right to ask
        logger.debug("memory of other processes is not known: %s", error)
        return 0


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
