"""CUDA launches of the normalizations: see ``kernels/norm.cu``."""

from __future__ import annotations

from cupy_engine.device import Array
from cupy_engine.ops._instantiations import NORM_ITEMS
from cupy_engine.ops._launch import check_contiguous, empty, launch, type_name, vector_width

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
    arrays = [array for array in (x, residual, weight, bias, out) if array is not None]
    width = vector_width(hidden, *arrays)
    num_vecs = hidden // width
    items = _items(width, num_vecs, _MAX_THREADS // 2 if num_tokens >= _MANY_TOKENS else _MAX_THREADS)
    block = -(-num_vecs // items // 32) * 32
    expression = f"norm<{type_name(x)}, {width}, {items}, {_bool(residual is not None)}, {_bool(center)}>"
    residual = x if residual is None else residual
    bias = weight if bias is None else bias
    launch("norm.cu", expression, (num_tokens,), block, out, x, residual, weight, bias, float(eps), hidden)
    return out


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
