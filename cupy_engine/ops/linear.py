"""The dense matrix product of a linear layer."""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops._tiled_matmul import matmul_few_rows


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
    y = matmul_few_rows(x.astype(np.float32, copy=False), weight.astype(np.float32, copy=False))
    if bias is not None:
        y += bias
    return y.astype(x.dtype, copy=False)
