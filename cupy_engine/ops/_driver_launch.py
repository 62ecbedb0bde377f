"""Launches through the driver, which lets kernels overlap on a stream: see ``kernels/common/overlap.cuh``."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any

_CONFIG = struct.Struct("7IPPI")  # CUlaunchConfig: grid, block, shared bytes, stream, attributes and their number
_ATTRIBUTE = struct.Struct("I4x3I52x")  # CUlaunchAttribute
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID
_ARGUMENTS, _ARGUMENTS_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_MAX_ARGUMENTS_BYTES = 4096


def launch(
    function: int,
    grid: tuple[int, int, int],
    block: int,
    shared_bytes: int,
    arguments: bytes,
    offsets: Sequence[int] = (),
    cluster: int = 1,
) -> None:
    """Launch a kernel on the current stream.

    Args:
        function: its handle, a ``CUfunction``.
        arguments: packed as a C struct.
        offsets: where in ``arguments`` each begins. To be given if one is aligned to more than 16 bytes: then the
            driver has a layout of its own.
        cluster: blocks of a cluster, along the grid's first size; beyond 1 for Hopper and later.

    Raises:
        cupy.cuda.driver.CUDADriverError: the driver refuses.
    """
    import cupy

    frame, stream = _frame, cupy.cuda.get_current_stream().ptr
    frame.arguments[: len(arguments)] = arguments
    frame.size.value = len(arguments)
    num_attributes = _num_attributes() + (cluster > 1)
    if cluster > 1:
        _ATTRIBUTE.pack_into(frame.attributes, _ATTRIBUTE.size, _CLUSTER_DIMENSION, cluster, 1, 1)
    _CONFIG.pack_into(frame.config, 0, *grid, block, 1, 1, shared_bytes, stream, frame.attributes_at, num_attributes)
    one_by_one = frame.pointers(offsets) if offsets else None
    status = _launch_function()(frame.config_at, function, one_by_one, None if offsets else frame.extra_at)
    if status:
        raise cupy.cuda.driver.CUDADriverError(status)


class _Frame(threading.local):
    """What the driver reads during a call, one per thread."""

    def __init__(self) -> None:
        self.attributes = ctypes.create_string_buffer(2 * _ATTRIBUTE.size)
        _ATTRIBUTE.pack_into(self.attributes, 0, _PROGRAMMATIC_STREAM_SERIALIZATION, 1, 0, 0)
        arguments = ctypes.create_string_buffer(_MAX_ARGUMENTS_BYTES)
        self.config = ctypes.create_string_buffer(_CONFIG.size)
        self.arguments = memoryview(arguments).cast("B")
        self.size = ctypes.c_size_t()
        addresses = (_ARGUMENTS, ctypes.addressof(arguments), _ARGUMENTS_SIZE, ctypes.addressof(self.size), _END)
        extra = (ctypes.c_void_p * len(addresses))(*addresses)
        self.config_at, self.extra_at = ctypes.addressof(self.config), ctypes.addressof(extra)
        self.attributes_at = ctypes.addressof(self.attributes)
        self._arguments_at = ctypes.addressof(arguments)
        self._kept = extra

    def pointers(self, offsets: Sequence[int]) -> Any:
        return (ctypes.c_void_p * len(offsets))(*(self._arguments_at + offset for offset in offsets))


_frame = _Frame()


@functools.cache
def _launch_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p] * 4
    return function


@functools.cache
def _num_attributes() -> int:
    """The attribute that lets kernels overlap, where the GPU knows it."""
    import cupy

    return int(int(cupy.cuda.Device().compute_capability) >= 90)
