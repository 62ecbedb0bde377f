"""CUDA launches of the normalizations: see ``kernels/norm.cu``."""

from __future__ import annotations

import functools

from cupy_engine.device import Array
from cupy_engine.ops._instantiations import NORM_ITEMS
from cupy_engine.ops._launch import Launch, check_contiguous, empty, type_name, vector_width

_MAX_THREADS = 512
_MANY_TOKENS = 1024  # from here on smaller blocks, with more of a row per thread, keep more memory traffic in flight


def norm(
    x: Array, residual: Array | None, weight: Array, bias: Array | None, eps: float, out: Array | None, *, center: bool
) -> Array:
    """RMSNorm, or LayerNorm if ``center``, of ``x`` or, if there is a residual, of ``residual += x``.

    Args:
        x: [T, H], contiguous.
        residual: [T, H], contiguous, updated in place; or ``None``.
        weight: [H].
        bias: [H], or ``None`` if not ``center``.
        eps: added to the mean square.
        out: [T, H], contiguous; allocated if absent.

    Returns:
        [T, H], ``out``.

    Raises:
        ValueError: H is too large for a block's registers, or an array is not contiguous.
    """
    out = empty(x.shape, x.dtype) if out is None else out
    check_contiguous(x=x, residual=x if residual is None else residual, weight=weight, out=out)
    num_tokens, hidden = x.shape
    if num_tokens == 0:
        return out
    has_residual = residual is not None
    residual = x if residual is None else residual
    bias = weight if bias is None else bias
    width = vector_width(hidden, x, residual, weight, bias, out)
    _launch(type_name(x), num_tokens, hidden, width, has_residual, center, eps)(out, x, residual, weight, bias)
    return out


@functools.lru_cache(maxsize=1024)
def _launch(
    type_: str, num_tokens: int, hidden: int, width: int, has_residual: bool, center: bool, eps: float
) -> Launch:
    num_vecs = hidden // width
    items = _items(width, num_vecs, _MAX_THREADS // 2 if num_tokens >= _MANY_TOKENS else _MAX_THREADS)
    block = -(-num_vecs // items // 32) * 32
    expression = f"norm<{type_}, {width}, {items}, {_bool(has_residual)}, {_bool(center)}>"
    return Launch("norm.cu", expression, (num_tokens,), block, float(eps), hidden)


def _items(width: int, num_vecs: int, threads: int) -> int:
    """Vectors per thread: the fewest with which a row fits ``threads`` threads, else the largest block."""
    for items in NORM_ITEMS[width]:
        if num_vecs <= items * threads:
            return items
    most = NORM_ITEMS[width][-1] * _MAX_THREADS
    if num_vecs > most:
        raise ValueError(f"rows of {num_vecs * width} elements are too long: at most {most * width}")
    return NORM_ITEMS[width][-1]


def _bool(value: bool) -> str:
    return "true" if value else "false"
