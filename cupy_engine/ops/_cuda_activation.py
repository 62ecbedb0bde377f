"""CUDA launches of the activation functions: see ``kernels/activation.cu``."""

from __future__ import annotations

import functools

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops._launch import Launch, check_contiguous, empty, type_name, vector_width

_BLOCK = 256


def activate_and_mul(gate_up: Array, function: str, out: Array | None) -> Array:
    """``function(gate) * up`` for gate_up [T, 2 I], contiguous. Returns ``out`` [T, I], allocated if absent."""
    num_tokens, inter = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((num_tokens, inter), gate_up.dtype) if out is None else out
    check_contiguous(gate_up=gate_up, out=out)
    if out.size:
        width = vector_width(inter, gate_up, out)
        _gated_launch(type_name(gate_up), width, function, inter, out.size // width)(out, gate_up)
    return out


def activate(x: Array, function: str) -> Array:
    """An elementwise function of ``kernels/activation.cu`` by its name there. Returns an array like ``x``."""
    out = empty(x.shape, x.dtype)
    check_contiguous(x=x)
    if x.size:
        width = vector_width(x.size, x, out)
        _plain_launch(type_name(x), width, function, x.size // width)(out, x)
    return out


@functools.lru_cache(maxsize=1024)
def _gated_launch(type_: str, width: int, function: str, inter: int, num_vecs: int) -> Launch:
    expression = f"activate_and_mul<{type_}, {width}, {function}>"
    return Launch("activation.cu", expression, _grid(num_vecs), _BLOCK, inter, np.uint32(num_vecs))


@functools.lru_cache(maxsize=1024)
def _plain_launch(type_: str, width: int, function: str, num_vecs: int) -> Launch:
    expression = f"activate<{type_}, {width}, {function}>"
    return Launch("activation.cu", expression, _grid(num_vecs), _BLOCK, np.uint32(num_vecs))


def _grid(num_vecs: int) -> tuple[int]:
    if num_vecs >= 1 << 31:
        raise ValueError(f"the array is too large for one launch: {num_vecs} vectors of at most {(1 << 31) - 1}")
    return (-(-num_vecs // _BLOCK),)
