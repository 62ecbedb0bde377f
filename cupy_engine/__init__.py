"""A torch-free LLM serving engine: paged attention, continuous batching and an OpenAI server on CuPy or NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cupy_engine.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
)

if TYPE_CHECKING:
    from cupy_engine.config import EngineConfig
    from cupy_engine.engine import Engine
    from cupy_engine.model_registry import register_model
    from cupy_engine.outputs import CompletionDelta, CompletionOutput, RequestOutput, TokenLogprob
    from cupy_engine.sampling_params import SamplingParams
    from cupy_engine.structured_outputs import StructuredOutputs

__version__ = "0.1.0"

__all__ = [
    "CompletionDelta",
    "CompletionOutput",
    "ConfigError",
    "DeadlineExceededError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "InvalidRequestError",
    "ModelLoadError",
    "QueueFullError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprob",
    "register_model",
]

_LAZY = {  # heavy to import: found when first asked for
    "CompletionDelta": "outputs",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "EngineConfig": "config",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "StructuredOutputs": "structured_outputs",
    "TokenLogprob": "outputs",
    "register_model": "model_registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
