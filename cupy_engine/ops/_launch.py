"""What every CUDA launch in this package needs: type names, vector widths, kernel arguments.

A step without a graph makes hundreds of launches, and a short prompt's waits for the host to make them. So what follows
from shapes and dtypes alone is worked out once and kept as a :class:`Launch`.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import ml_dtypes
import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _compile, _driver_launch

BFLOAT16: Any = np.dtype(ml_dtypes.bfloat16)
TYPE_NAMES: dict[Any, str] = {np.dtype(np.float32): "float", np.dtype(np.float16): "fp16", BFLOAT16: "bf16"}


def type_name(array: Array) -> str:
    """The CUDA name of an array's element type.

    Raises:
        TypeError: there are no kernels for it.
    """
    try:
        return TYPE_NAMES[array.dtype]
    except KeyError:
        known = ", ".join(map(str, TYPE_NAMES))
        raise TypeError(f"no kernels for {array.dtype}; there are some for {known}") from None


def as_dtype(name: str) -> np.dtype[Any]:
    """By name, which NumPy alone does not know of bfloat16."""
    dtype: np.dtype[Any] = BFLOAT16 if name == "bfloat16" else np.dtype(name)
    return dtype


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialized array on the current GPU, from CuPy's memory pool."""
    import cupy

    return cupy.empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of zeros on the current GPU."""
    import cupy

    return cupy.zeros(shape, dtype)


def address(array: Array) -> int:
    """Where an array's elements start."""
    return int(array.data.ptr)


def vector_width(row_length: int, *arrays: Array) -> int:
    """Elements per memory access: 16 bytes of them if ``row_length`` and all arrays allow it, else 1."""
    width = 16 // int(arrays[0].itemsize)
    bits = 0
    for array in arrays:
        bits |= array.data.ptr
    return width if row_length % width == 0 and bits % 16 == 0 else 1


def check_contiguous(**arrays: Array) -> None:
    """Kernels ignore strides.

    Raises:
        ValueError: an array is not C-contiguous; the message names it.
    """
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous, got shape {array.shape} with strides {array.strides}")


@functools.cache
def is_hopper() -> bool:
    """Whether the current GPU knows the instructions of sm_90a."""
    import cupy

    return str(cupy.cuda.Device().compute_capability) == "90"


@functools.cache
def num_multiprocessors() -> int:
    """Of the current GPU."""
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


class Launch:
    """A kernel with all of its launch but the arrays, which are its first parameters.

    Args:
        file, expression, shared_bytes: as for :func:`._compile.kernel`.
        grid: up to three sizes.
        block: threads.
        scalars: the last parameters; integers travel as int32, floats as float32, NumPy's scalars as they are.
    """

    def __init__(
        self, file: str, expression: str, grid: tuple[int, ...], block: int, *scalars: Any, shared_bytes: int = 0
    ) -> None:
        self._shape = _function(file, expression, shared_bytes), _three(grid), block, shared_bytes
        self._scalars = pack(*scalars)

    def __call__(self, *arrays: Array | None) -> None:
        """Launch on the current stream; arrays travel as addresses, ``None`` as the null pointer."""
        addresses = [0 if array is None else array.data.ptr for array in arrays]
        _driver_launch.launch(*self._shape, struct.pack(f"{len(arrays)}P", *addresses) + self._scalars)


def launch(
    file: str, expression: str, grid: tuple[int, ...], block: int, *arguments: Any, shared_bytes: int = 0
) -> None:
    """Launch a kernel on the current stream with arguments in any order, packed as :func:`pack` does."""
    function = _function(file, expression, shared_bytes)
    _driver_launch.launch(function, _three(grid), block, shared_bytes, pack(*arguments))


def launch_with_maps(
    file: str,
    expression: str,
    grid: tuple[int, ...],
    block: int,
    *arguments: Any,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    """As :func:`launch`, for arguments among which are tensor maps: see :mod:`._tensor_map`.

    ``cluster``: blocks of a cluster, along the grid's first size.
    """
    function = _function(file, expression, shared_bytes)
    _driver_launch.launch(function, _three(grid), block, shared_bytes, *_pack(*arguments), cluster)


def pack(*arguments: Any) -> bytes:
    """Kernel parameters as the C struct of them.

    Arrays on the device travel as addresses, ``None`` as the null pointer, integers as int32, floats as float32, and
    NumPy's scalars and structured arrays as they are.
    """
    return _pack(*arguments)[0]


def _pack(*arguments: Any) -> tuple[bytes, list[int]]:
    """The struct, and where in it each argument begins."""
    packed, offsets = bytearray(), []
    for argument in arguments:
        value, alignment = _pack_one(argument)
        packed += bytes(-len(packed) % alignment)
        offsets.append(len(packed))
        packed += value
    return bytes(packed), offsets


def _pack_one(argument: Any) -> tuple[bytes, int]:
    """Its bytes and their alignment."""
    if type(argument) is int:
        argument = np.int32(argument)
    elif type(argument) is float:
        argument = np.float32(argument)
    if isinstance(argument, np.generic):
        return argument.tobytes(), argument.itemsize
    if isinstance(argument, np.ndarray):  # a struct
        return argument.tobytes(), 8
    if isinstance(argument, bytes):  # a tensor map
        return argument, 8
    return struct.pack("P", 0 if argument is None else argument.data.ptr), 8


@functools.cache
def _function(file: str, expression: str, shared_bytes: int) -> int:
    """The kernel's handle, valid as long as the kernel is kept, which :func:`._compile.kernel` does."""
    return int(_compile.kernel(file, expression, shared_bytes).kernel.ptr)


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z
