"""How weights get from a checkpoint into layers: tensors by name, in the model's dtype, in a weight format.

A :class:`Loader` is a place in the checkpoint's tree of modules; names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cupy_engine.device import Array, Device
from cupy_engine.ops.activation import GatedActivation
from cupy_engine.ops.gated_linear import gated_linear
from cupy_engine.ops.linear import linear


class LinearWeight(Protocol):
    """A linear layer's weight in some format; knows how to multiply by it."""

    def apply(self, x: Array) -> Array:
        """[T, K] → [T, N], or [T, N / 2] if it was loaded with an activation."""


class LinearScheme(Protocol):
    """A weight format: loads linear layers whose checkpoint tensors look its way."""

    def load(
        self,
        loader: Loader,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        bias: bool,
        activation: GatedActivation | None = None,
    ) -> LinearWeight:
        """One weight of the named layers stacked along their outputs.

        With an activation they are a gate and what it is for: ``act(gate) * up`` is the weight's product.
        """


@dataclass(slots=True)
class UnquantizedWeight:
    """``weight`` [N, K] and ``bias`` [N] in the model's dtype."""

    weight: Array
    bias: Array | None
    activation: GatedActivation | None = None

    def apply(self, x: Array) -> Array:
        if self.activation is None:
            return linear(x, self.weight, self.bias)
        return gated_linear(x, self.weight, self.bias, self.activation)


class UnquantizedScheme:
    """Tensors ``name.weight`` [N, K] and ``name.bias`` [N] in floating point."""

    def load(
        self,
        loader: Loader,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        bias: bool,
        activation: GatedActivation | None = None,
    ) -> LinearWeight:
        parts = list(zip(names, out_features, strict=True))
        weight = loader.stacked([(f"{name}.weight", (n, in_features)) for name, n in parts])
        loader.loaded.products.append(DenseProduct(weight, bias, loader.dtype, activation))
        biases = loader.stacked([(f"{name}.bias", (n,)) for name, n in parts]) if bias else None
        return UnquantizedWeight(weight, biases, activation)


@dataclass(frozen=True, slots=True)
class DenseProduct:
    """A matrix [N, K] that steps multiply by, for whoever wants to tune the product."""

    weight: Array
    has_bias: bool
    out_dtype: Any
    activation: GatedActivation | None = None


@dataclass(slots=True)
class LoadedWeights:
    """What a loader and those below it have loaded so far."""

    num_bytes: int = 0
    products: list[DenseProduct] = field(default_factory=list)


class TensorSource(Protocol):
    """Tensors of a checkpoint by name; a WeightSource, or a view of one."""

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor, of exactly this shape. Raises ModelLoadError."""


@dataclass(frozen=True, slots=True)
class Loader:
    """Brings tensors from a source to a device. ``at`` descends into a module, as checkpoint names do.

    All weights pass through :meth:`stacked` and :meth:`tensor`.
    """

    source: TensorSource
    device: Device
    dtype: Any
    scheme: LinearScheme = field(default_factory=UnquantizedScheme)
    prefix: str = ""
    loaded: LoadedWeights = field(default_factory=LoadedWeights)

    def at(self, module: str) -> Loader:
        """The loader of a sub-module."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """One tensor on the device, in the model's dtype."""
        return self.stacked([(name, shape)])

    def stacked(self, parts: Sequence[tuple[str, tuple[int, ...]]]) -> Array:
        """Tensors (name, shape) joined along their first axis."""
        array = self.device.stack([self.source.take(self.prefix + name, shape) for name, shape in parts], self.dtype)
        self.loaded.num_bytes += array.nbytes
        return array
