"""Where the golden outputs are: see golden/README.md."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
TINY_MODELS = tuple(sorted(folder.name for folder in (GOLDEN / "tiny").iterdir()))


def tiny_model(name: str) -> Path:
    """The folder of a tiny random model."""
    return GOLDEN / "tiny" / name


@cache
def greedy_prompts() -> list[dict[str, Any]]:
    """The twelve prompts of the default model with their token ids, greedy continuation and logprobs."""
    prompts: list[dict[str, Any]] = json.loads((GOLDEN / "smollm2_greedy.json").read_text())
    return prompts
