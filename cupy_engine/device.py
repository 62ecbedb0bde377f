"""Where arrays live. Models, layers and caches allocate through a Device and never name an array module themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cupy_engine.host_memory import keep_freed_memory

Array = Any  # numpy.ndarray or cupy.ndarray: same shape, dtype and slicing semantics


class Device(Protocol):
    """An array module and the memory behind it."""

    @property
    def name(self) -> str: ...

    @property
    def xp(self) -> Any: ...

    @property
    def pci_bus_id(self) -> str | None:
        """The GPU's name to the driver's tools; ``None`` where there is no GPU."""

    def asarray(self, host: np.ndarray, dtype: Any = None) -> Array:
        """Bring a host array over, converted to ``dtype`` if given."""

    def stack(self, parts: Sequence[Array], dtype: Any) -> Array:
        """Arrays of the host, or already here, joined along their first axis and converted to ``dtype``."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Host memory that the device can copy from and to at full speed."""

    def to_host(self, array: Array) -> np.ndarray: ...

    def free_memory_bytes(self) -> int:
        """Memory that is free for this process right now."""


class NumpyDevice:
    """The CPU: float32 arithmetic in NumPy's BLAS."""

    name = "cpu"
    xp = np
    pci_bus_id = None

    def __init__(self) -> None:
        keep_freed_memory()

    def asarray(self, host: np.ndarray, dtype: Any = None) -> np.ndarray:
        # A read-only array is a mapped file: huge pages, and safety from a file that shrinks, need memory of our own.
        return np.array(host, dtype, order="C", copy=None if host.flags.writeable else True)

    def stack(self, parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        return self.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def free_memory_bytes(self) -> int:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        raise OSError("/proc/meminfo has no MemAvailable line")
