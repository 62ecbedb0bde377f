"""What every CUDA launch in this package needs: type names, vector widths, kernel arguments.

A step without a graph makes hundreds of launches, and a short prompt's waits for the host to make them. So what follows
from shapes and dtypes alone is worked out once and kept as a :class:`Launch`.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _compile

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
        self._function = _function(file, expression, shared_bytes)
        self._grid = grid
        self._block = (block,)
        self._scalars = _pack(scalars)
        self._shared_bytes = shared_bytes

    def __call__(self, *arrays: Any) -> None:
        """Launch on the current stream; arrays travel as addresses."""
        self._function(self._grid, self._block, arrays + self._scalars, shared_mem=self._shared_bytes)


def launch(
    file: str, expression: str, grid: tuple[int, ...], block: int, *arguments: Any, shared_bytes: int = 0
) -> None:
    """Launch a kernel on the current stream with arguments in any order, packed as those of a :class:`Launch`."""
    _function(file, expression, shared_bytes)(grid, (block,), _pack(arguments), shared_mem=shared_bytes)


@functools.cache
def _function(file: str, expression: str, shared_bytes: int) -> Any:
    # The bare function: a RawKernel asks for the current device at every launch.
    return _compile.kernel(file, expression, shared_bytes).kernel


def _pack(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        np.int32(argument) if type(argument) is int else np.float32(argument) if type(argument) is float else argument
        for argument in arguments
    )
