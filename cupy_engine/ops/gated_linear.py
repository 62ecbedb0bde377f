"""The first half of a gated MLP (arXiv:2002.05202): two linear layers, one of them activated, multiplied."""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _gated_gemm
from cupy_engine.ops.activation import GatedActivation
from cupy_engine.ops.linear import linear


def gated_linear(x: Array, weight: Array, bias: Array | None, activation: GatedActivation) -> Array:
    """``act(gate(x)) * up(x)``.

    Args:
        x: [T, K].
        weight: [2 * I, K], the gate's rows first; as in :func:`.linear.linear`, nothing queued may be writing it.
        bias: [2 * I] in the dtype of ``x``.
        activation: see :func:`.activation.gated_activation`.

    Returns:
        [T, I] in the dtype of ``x``.

    Example::

        inner = gated_linear(hidden, weight, None, gated_activation("silu"))
    """
    if isinstance(x, np.ndarray):
        return activation(linear(x, weight, bias))
    return _gated_gemm.gated_matmul(x, weight, bias, activation.functor)
