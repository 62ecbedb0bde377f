"""Maps of matrices for the GPU's tensor memory accelerator: see ``kernels/common/tensor_copies.cuh``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_uint32, c_uint64, c_void_p
from typing import Any

MAP_BYTES = 128
PANEL_COLUMNS = 64  # of 16-bit elements: rows of 128 bytes
_MAP_ALIGNMENT = 64
_DATA_TYPES = {"fp16": 6, "bf16": 9}  # CUtensorMapDataType
_NOT_INTERLEAVED, _ZEROS_OUTSIDE, _SWIZZLE_128_BYTES, _FETCH_256_BYTES = 0, 0, 3, 3


@functools.lru_cache(maxsize=8192)
def tensor_map(
    address: int, type_name: str, sizes: tuple[int, ...], distances: tuple[int, ...], box: tuple[int, ...]
) -> bytes:
    """A matrix, or several, and the box that one copy moves, as bytes that travel as a kernel parameter.

    Args:
        address: of the first element, a multiple of 16, as all distances are.
        type_name: of the elements, ``bf16`` or ``fp16``.
        sizes: from the innermost dimension, which is contiguous, to the outermost.
        distances: bytes from one index to the next, for all dimensions but the innermost.
        box: elements in each dimension, at most 256, and 64 in the innermost.

    Raises:
        ValueError: the driver finds this impossible, for want of alignment for example.
    """
    room = ctypes.create_string_buffer(MAP_BYTES + _MAP_ALIGNMENT)
    at = -(-ctypes.addressof(room) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    status = _encode_function()(
        *(at, _DATA_TYPES[type_name], len(sizes), address),
        *(
            _array(c_uint64, sizes),
            _array(c_uint64, distances),
            _array(c_uint32, box),
            _array(c_uint32, [1] * len(box)),
        ),
        *(_NOT_INTERLEAVED, _SWIZZLE_128_BYTES, _FETCH_256_BYTES, _ZEROS_OUTSIDE),
    )
    if status:
        raise ValueError(f"no tensor map of sizes {sizes}, distances {distances} and box {box}: CUresult {status}")
    return ctypes.string_at(at, MAP_BYTES)


def _array(element: Any, values: Sequence[int]) -> Any:
    return (element * len(values))(*values)


@functools.cache
def _encode_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    function.argtypes = [c_void_p, ctypes.c_int, c_uint32, *[c_void_p] * 5, *[ctypes.c_int] * 4]
    return function
