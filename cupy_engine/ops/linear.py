"""The dense matrix product of a linear layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _gemm
from cupy_engine.ops._tiled_matmul import matmul_transposed


def linear(x: Array, weight: Array, bias: Array | None = None, *, out_dtype: Any = None) -> Array:
    """``x @ weight.T + bias``.

    Args:
        x: [T, K].
        weight: [N, K], as Hugging Face stores it. On a GPU it is read before kernels queued ahead of this have ended,
            so none of them may be writing it.
        bias: [N] in the result's dtype.
        out_dtype: of the result; default that of ``x``. The sums are float32 in any case.

    Returns:
        [T, N] with whatever strides the backend found fastest.

    Example::

        qkv = linear(hidden, weight, bias)
    """
    if not isinstance(x, np.ndarray):
        return _gemm.matmul(x, weight, bias, out_dtype)
    y = matmul_transposed(x.astype(np.float32, copy=False), weight.astype(np.float32, copy=False))
    if bias is not None:
        y += bias
    return y.astype(x.dtype if out_dtype is None else out_dtype, copy=False)
