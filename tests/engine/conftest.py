"""The engine is asked for the default model by its name, as users do."""

from __future__ import annotations

import pytest

from cupy_engine.model_source import ModelFiles


@pytest.fixture(scope="session")
def default_model_name(default_model: ModelFiles) -> str:
    return default_model.name
