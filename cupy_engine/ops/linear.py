"""The dense matrix product of a linear layer."""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x @ weight.T + bias``.

    Args:
        x: [T, K].
        weight: [N, K], as Hugging Face stores it.
        bias: [N].

    Returns:
        [T, N] in the dtype of ``x``, with whatever strides the backend found fastest.

    Example::

        qkv = linear(hidden, weight, bias)
    """
    # weight @ x.T is faster than x @ weight.T for few rows: BLAS then streams the large operand only once.
    x32 = x.astype(np.float32, copy=False)
    y = np.matmul(weight.astype(np.float32, copy=False), x32.T).T
    if bias is not None:
        y += bias
    return y.astype(x.dtype, copy=False)
