"""Root-mean-square and layer normalization, alone or fused with the residual addition before them.

Shapes: T tokens, H hidden size. Arithmetic is float32 whatever the arrays hold; results have the dtype of ``x``.
"""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _cuda_norm


def rms_norm(x: Array, weight: Array, eps: float, out: Array | None = None) -> Array:
    """``x * weight / sqrt(mean(x²) + eps)`` along the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: [T, H].
        weight: [H].
        eps: added to the mean square.
        out: [T, H], may be ``x``; allocated if absent.

    Returns:
        [T, H], ``out``.

    Example::

        hidden = rms_norm(hidden, weight, 1e-5)
    """
    if not isinstance(x, np.ndarray):
        return _cuda_norm.norm(x, None, weight, None, eps, out, center=False)
    return _rms_norm_reference(x, weight, eps, out)


def add_rms_norm(x: Array, residual: Array, weight: Array, eps: float, out: Array | None = None) -> Array:
    """``residual += x`` in place, then ``rms_norm(residual)``: the step between two blocks of a pre-norm transformer.

    Args:
        x: [T, H], the last block's output.
        residual: [T, H], updated in place.
        weight: [H].
        eps: added to the mean square.
        out: [T, H], may be ``x``; allocated if absent.

    Returns:
        [T, H], ``out``.
    """
    if not isinstance(x, np.ndarray):
        return _cuda_norm.norm(x, residual, weight, None, eps, out, center=False)
    residual += x
    return _rms_norm_reference(residual, weight, eps, out)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, out: Array | None = None) -> Array:
    """``(x - mean(x)) * weight / sqrt(var(x) + eps) + bias`` along the last axis (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [T, H].
        weight, bias: [H].
        eps: added to the variance.
        out: [T, H], may be ``x``; allocated if absent.

    Returns:
        [T, H], ``out``.
    """
    if not isinstance(x, np.ndarray):
        return _cuda_norm.norm(x, None, weight, bias, eps, out, center=True)
    return _layer_norm_reference(x, weight, bias, eps, out)


def add_layer_norm(
    x: Array, residual: Array, weight: Array, bias: Array, eps: float, out: Array | None = None
) -> Array:
    """``residual += x`` in place, then ``layer_norm(residual)``. Arguments as for those two.

    Returns:
        [T, H], ``out``.
    """
    if not isinstance(x, np.ndarray):
        return _cuda_norm.norm(x, residual, weight, bias, eps, out, center=True)
    residual += x
    return _layer_norm_reference(residual, weight, bias, eps, out)


def _rms_norm_reference(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray | None) -> np.ndarray:
    x32 = x.astype(np.float32, copy=False)
    scale = np.vecdot(x32, x32)
    scale /= x.shape[-1]
    scale += eps
    np.sqrt(scale, out=scale)
    normed = x32 / scale[:, None]
    normed *= weight
    return _store(normed, x, out)


def _layer_norm_reference(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray | None
) -> np.ndarray:
    x32 = x.astype(np.float32, copy=False)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = np.vecdot(centred, centred) / np.float32(x.shape[-1])
    centred /= np.sqrt(variance + np.float32(eps))[:, None]
    centred *= weight
    centred += bias
    return _store(centred, x, out)


def _store(result: np.ndarray, x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return result.astype(x.dtype, copy=False)
    out[...] = result
    return out
