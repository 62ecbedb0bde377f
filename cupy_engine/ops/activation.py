"""Activation functions, by the names Hugging Face configurations give them.

Arithmetic is float32 whatever the arrays hold; results have the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from cupy_engine.device import Array
from cupy_engine.errors import ConfigError
from cupy_engine.ops import _cuda_activation

GeluForm = Literal["none", "tanh"]

F = TypeVar("F")

_ONE = np.float32(1.0)
_MAX_EXPONENT = np.float32(88.0)  # exp of more overflows float32
_GELU_KERNELS: dict[GeluForm, str] = {"none": "Gelu", "tanh": "GeluTanh"}


def silu_and_mul(gate_up: Array, out: Array | None = None) -> Array:
    """``silu(gate) * up`` with ``silu(x) = x / (1 + exp(-x))``: SwiGLU's elementwise part (arXiv:2002.05202).

    Args:
        gate_up: [T, 2 * I], the gate's columns first.
        out: [T, I]; allocated if absent.

    Returns:
        [T, I], ``out``.

    Example::

        hidden = down(silu_and_mul(gate_up(hidden)))
    """
    if not isinstance(gate_up, np.ndarray):
        return _cuda_activation.activate_and_mul(gate_up, "Silu", out)
    half = gate_up.shape[-1] // 2
    return _store(silu(gate_up[:, :half]) * gate_up[:, half:], out)


def gelu_and_mul(gate_up: Array, out: Array | None = None, *, approximate: GeluForm = "none") -> Array:
    """``gelu(gate) * up``: GeGLU's elementwise part. Arguments as for :func:`silu_and_mul` and :func:`gelu`.

    Returns:
        [T, I], ``out``.
    """
    if not isinstance(gate_up, np.ndarray):
        return _cuda_activation.activate_and_mul(gate_up, _GELU_KERNELS[approximate], out)
    half = gate_up.shape[-1] // 2
    return _store(gelu(gate_up[:, :half], approximate) * gate_up[:, half:], out)


def gelu(x: Array, approximate: GeluForm = "none") -> Array:
    """``x * Φ(x)`` with the normal distribution's Φ, or its tanh approximation (arXiv:1606.08415).

    Args:
        x: any shape.
        approximate: ``"tanh"`` for ``x/2 * (1 + tanh(sqrt(2/π) * (x + 0.044715 x³)))``.

    Returns:
        An array like ``x``.
    """
    if not isinstance(x, np.ndarray):
        return _cuda_activation.activate(x, _GELU_KERNELS[approximate])
    x32 = x.astype(np.float32, copy=False)
    if approximate == "tanh":
        inner = np.square(x32)
        inner *= np.float32(0.044715)
        inner += np.float32(1.0)
        inner *= x32
        inner *= np.float32(math.sqrt(2.0 / math.pi))
        np.tanh(inner, out=inner)
        inner += np.float32(1.0)
        inner *= np.float32(0.5)
        inner *= x32
        return inner.astype(x.dtype, copy=False)
    return (x32 * _normal_cdf(x32)).astype(x.dtype, copy=False)


def quick_gelu(x: Array) -> Array:
    """``x / (1 + exp(-1.702 x))``, the sigmoid approximation of GELU. Returns an array like ``x``."""
    if not isinstance(x, np.ndarray):
        return _cuda_activation.activate(x, "QuickGelu")
    return _silu_reference(x, np.float32(1.702))


def silu(x: Array) -> Array:
    """``x / (1 + exp(-x))``. Returns an array like ``x``."""
    if not isinstance(x, np.ndarray):
        return _cuda_activation.activate(x, "Silu")
    return _silu_reference(x, np.float32(1.0))


def relu(x: Array) -> Array:
    """``max(x, 0)``. Returns an array like ``x``."""
    if not isinstance(x, np.ndarray):
        return _cuda_activation.activate(x, "Relu")
    return np.maximum(x, x.dtype.type(0))


def squared_relu(x: Array) -> Array:
    """``max(x, 0)²`` (Primer, arXiv:2109.08668). Returns an array like ``x``."""
    if not isinstance(x, np.ndarray):
        return _cuda_activation.activate(x, "SquaredRelu")
    return np.square(relu(x))


def gelu_tanh_and_mul(gate_up: Array, out: Array | None = None) -> Array:
    """:func:`gelu_and_mul` in its tanh approximation."""
    return gelu_and_mul(gate_up, out, approximate="tanh")


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh approximation. Returns an array like ``x``."""
    return gelu(x, "tanh")


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu2": squared_relu,
}


@dataclass(frozen=True, slots=True)
class GatedActivation:
    """``act(gate) * up``: [T, 2 * I] → [T, I], ``out`` if given. ``functor`` is what the kernels call ``act``."""

    function: Callable[[Array, Array | None], Array]
    functor: str

    def __call__(self, gate_up: Array, out: Array | None = None) -> Array:
        return self.function(gate_up, out)


_SILU = GatedActivation(silu_and_mul, "Silu")
_GELU = GatedActivation(gelu_and_mul, _GELU_KERNELS["none"])
_GELU_TANH = GatedActivation(gelu_tanh_and_mul, _GELU_KERNELS["tanh"])

GATED_ACTIVATIONS: dict[str, GatedActivation] = {
    "silu": _SILU,
    "swish": _SILU,
    "gelu": _GELU,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function that configurations call ``name``.

    Raises:
        ConfigError: no such activation; the message lists those there are.
    """
    return _by_name(ACTIVATIONS, name)


def gated_activation(name: str) -> GatedActivation:
    """``act(gate) * up`` for the activation that configurations call ``name``.

    Raises:
        ConfigError: no such gated activation; the message lists those there are.
    """
    return _by_name(GATED_ACTIVATIONS, name)


def _by_name(functions: Mapping[str, F], name: str) -> F:
    if name not in functions:
        raise ConfigError("activation", f"{name!r} is not supported here; supported are {', '.join(functions)}")
    return functions[name]


def _silu_reference(x: np.ndarray, slope: np.float32) -> np.ndarray:
    x32 = x.astype(np.float32, copy=False)
    sigmoid = x32 * -slope
    np.minimum(sigmoid, _MAX_EXPONENT, out=sigmoid)
    np.exp(sigmoid, out=sigmoid)
    sigmoid += _ONE
    np.divide(x32, sigmoid, out=sigmoid)
    return sigmoid.astype(x.dtype, copy=False)


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    # Φ(x) = erfc(-x / √2) / 2, with erfc from Abramowitz & Stegun 7.1.26 (absolute error below 1.5e-7).
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1.0 / (1.0 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(coefficient)
        series *= t
    tail: np.ndarray = series * np.exp(-z * z) * np.float32(0.5)
    return np.where(x > 0, 1.0 - tail, tail)


def _store(result: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return result
    out[...] = result
    return out
