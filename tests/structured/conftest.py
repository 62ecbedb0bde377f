"""The default model's vocabulary, as the grammar library has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cupy_engine.config import EngineConfig
from cupy_engine.guide_vocabulary import load_vocabulary
from cupy_engine.guides import Guides
from cupy_engine.model_source import ModelFiles, load_model_config
from cupy_engine.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 49152


@pytest.fixture(scope="session")
def tokenizer(default_model: ModelFiles) -> Tokenizer:
    tokenizer = load_tokenizer(default_model)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def vocabulary(default_model: ModelFiles) -> object:
    return load_vocabulary(EngineConfig(), default_model, load_model_config(default_model))


@pytest.fixture
def guides(vocabulary: object) -> Iterator[Guides]:
    guides = Guides(lambda: vocabulary, VOCAB_SIZE)
    yield guides
    guides.close()
