"""Servers of random weights with the default model's tokenizer, and its dummy twin: next to nothing to compute."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cupy_engine.config import EngineConfig
from cupy_engine.frontend import FrontEnd
from cupy_engine.tokenizer import Tokenizer

from .server_process import ServerProcess
from .workloads import SHAPES, write_shape

TWIN = "smollm2-twin"


@contextmanager
def serve_twin(*options: str) -> Iterator[ServerProcess]:
    """A server of the twin, whose vocabulary is the default tokenizer's 4096 most common tokens."""
    with serve_shape(TWIN, None, *options) as server:
        yield server


@contextmanager
def serve_shape(shape: str, vocab_size: int | None, *options: str) -> Iterator[ServerProcess]:
    """A server of random weights of this shape, with the shape's own vocabulary or another size."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_shape(shape, Path(folder), vocab_size))
        common = ("--load-format", "dummy", "--tokenizer", "smollm2-135m", "--no-log-requests")
        with ServerProcess.serve(model, *common, *options) as server:
            yield server


def common_words() -> list[str]:
    """Words that are one token each, all within the twin's vocabulary."""
    tokenizer = _tokenizer()
    texts = (tokenizer.decode([token_id]) for token_id in range(SHAPES[TWIN]["vocab_size"]))
    return [text.strip() for text in texts if re.fullmatch(r" [a-z]+", text)]


def default_vocab_size() -> int:
    """That of the tokenizer."""
    return _tokenizer().vocab_size


def _tokenizer() -> Tokenizer:
    tokenizer = FrontEnd.from_config(EngineConfig()).tokenizer
    assert tokenizer is not None
    return tokenizer


def random_texts(words: list[str], num_words: int, seed: int = 0) -> Iterator[str]:
    """Texts without an end, each of ``num_words`` tokens, no two alike."""
    rng = random.Random(seed)
    while True:
        yield " " + " ".join(rng.choices(words, k=num_words))
