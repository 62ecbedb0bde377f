"""The default model's dummy twin: its tokenizer and template, but next to nothing to compute."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cupy_engine.config import EngineConfig
from cupy_engine.frontend import FrontEnd

from .server_process import ServerProcess
from .workloads import SHAPES, write_shape

TWIN = "smollm2-twin"


@contextmanager
def serve_twin(*options: str) -> Iterator[ServerProcess]:
    """A server of the twin, whose vocabulary is the default tokenizer's 4096 most common tokens."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_shape(TWIN, Path(folder)))
        common = ("--load-format", "dummy", "--tokenizer", "smollm2-135m", "--no-log-requests")
        with ServerProcess.serve(model, *common, *options) as server:
            yield server


def common_words() -> list[str]:
    """Words that are one token each, all within the twin's vocabulary."""
    tokenizer = FrontEnd.from_config(EngineConfig()).tokenizer
    assert tokenizer is not None
    texts = (tokenizer.decode([token_id]) for token_id in range(SHAPES[TWIN]["vocab_size"]))
    return [text.strip() for text in texts if re.fullmatch(r" [a-z]+", text)]


def random_texts(words: list[str], num_words: int, seed: int = 0) -> Iterator[str]:
    """Texts without an end, each of ``num_words`` tokens, no two alike."""
    rng = random.Random(seed)
    while True:
        yield " " + " ".join(rng.choices(words, k=num_words))
