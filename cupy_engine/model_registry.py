"""Which class runs which architecture.

Classes are named by strings and imported when asked for. Other packages add their own, by calling
:func:`register_model` or with an entry point::

    [project.entry-points."cupy_engine.models"]
    MyForCausalLM = "my_package.my_model:MyForCausalLM"
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cupy_engine.errors import ModelLoadError

if TYPE_CHECKING:  # heavy; who reads a configuration needs only the names
    from cupy_engine.batch import Batch
    from cupy_engine.device import Array, Device
    from cupy_engine.kv_cache import KVCache
    from cupy_engine.loader import LoadedWeights
    from cupy_engine.model_config import ModelConfig
    from cupy_engine.weights import WeightSource

ENTRY_POINT_GROUP = "cupy_engine.models"


class CausalLM(Protocol):
    """A decoder-only language model over packed batches. T tokens, R of them in ``batch.output_rows``."""

    weights: LoadedWeights

    def __init__(self, config: ModelConfig, weights: WeightSource, device: Device, dtype: Any) -> None: ...

    def forward(self, batch: Batch, kv_cache: KVCache) -> Array:
        """Hidden states [R, H] after the last norm; stores all tokens' keys and values in the cache."""

    def compute_logits(self, hidden: Array) -> Array:
        """[R, H] → [R, V] float32."""


_MODELS: dict[str, str | type[CausalLM]] = {
    "LlamaForCausalLM": "cupy_engine.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "cupy_engine.models.mistral:MistralForCausalLM",
    "GPT2LMHeadModel": "cupy_engine.models.gpt2:GPT2LMHeadModel",
}


def register_model(architecture: str, model: str | type[CausalLM]) -> None:
    """Let ``architecture`` (as in ``config.json``) be run by a class, or by one named ``"module:Class"``.

    Replaces what was registered under that name::

        register_model("MyForCausalLM", "my_package.my_model:MyForCausalLM")
    """
    _MODELS[architecture] = model


def known_architectures() -> list[str]:
    """Every architecture that :func:`model_class` finds, sorted."""
    return sorted(_MODELS | {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)})


def check_architecture(architecture: str, file: Path | None = None) -> None:
    """Raises ModelLoadError if nobody registered it; the message lists who did. ``file`` says so."""
    if architecture not in _MODELS and not entry_points(group=ENTRY_POINT_GROUP, name=architecture):
        raise ModelLoadError(
            f"architecture {architecture!r} is unknown; known are {', '.join(known_architectures())}. "
            "cupy_engine.model_registry.register_model adds one",
            file=file,
        )


def model_class(architecture: str) -> type[CausalLM]:
    """The class that runs ``architecture``.

    Raises:
        ModelLoadError: nobody registered it (the message lists who did), or its class cannot be imported.
    """
    check_architecture(architecture)
    model = _MODELS.get(architecture) or entry_points(group=ENTRY_POINT_GROUP)[architecture].value
    return _import_class(model) if isinstance(model, str) else model


def _import_class(path: str) -> type[CausalLM]:
    module, _, name = path.partition(":")
    try:
        found: type[CausalLM] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelLoadError(f"model class {path!r} cannot be imported: {error}") from error
    return found
