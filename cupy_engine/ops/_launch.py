"""What every CUDA launch in this package needs: type names, vector widths, kernel arguments."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _compile
from cupy_engine.ops._instantiations import vector_widths

_TYPE_NAMES = {"float32": "float", "float16": "fp16", "bfloat16": "bf16"}


def type_name(array: Array) -> str:
    """The CUDA name of an array's element type.

    Raises:
        TypeError: there are no kernels for it.
    """
    try:
        return _TYPE_NAMES[array.dtype.name]
    except KeyError:
        raise TypeError(f"no kernels for {array.dtype}; there are some for {', '.join(_TYPE_NAMES)}") from None


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
    width = vector_widths(type_name(arrays[0]))[1]
    is_aligned = row_length % width == 0 and all(address(array) % 16 == 0 for array in arrays)
    return width if is_aligned else 1


def check_contiguous(**arrays: Array) -> None:
    """Kernels ignore strides.

    Raises:
        ValueError: an array is not C-contiguous; the message names it.
    """
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous, got shape {array.shape} with strides {array.strides}")


def launch(
    file: str, expression: str, grid: tuple[int, ...], block: int, *arguments: Any, shared_bytes: int = 0
) -> None:
    """Launch a kernel on the current stream. Integers travel as int32, floats as float32; arrays as addresses."""
    _compile.kernel(file, expression, shared_bytes)(grid, (block,), _pack(arguments), shared_mem=shared_bytes)


def _pack(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        np.int32(argument) if type(argument) is int else np.float32(argument) if type(argument) is float else argument
        for argument in arguments
    )
