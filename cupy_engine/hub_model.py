"""Models of the Hugging Face hub: configuration, safetensors and tokenizer files only, no code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from cupy_engine.errors import ModelLoadError

_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]


def is_hub_id(model: str) -> bool:
    """Whether a name looks like ``organization/model``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


def fetch_hub_model(hub_id: str, *, offline: bool = False, progress: bool = True) -> Path:
    """The folder with a hub model's files, downloaded as needed by ``huggingface_hub`` with the user's settings for it.

    Raises:
        ModelLoadError: the ``hub`` extra is not installed, or the hub does not give the model; says which.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelLoadError(
            f"{hub_id!r} is no file or folder here, and models of the hub need `pip install 'cupy-engine[hub]'`"
        )
    import huggingface_hub

    bar = None if progress else _silent_bar()
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=_FILES, local_files_only=offline, tqdm_class=bar
        )
    except Exception as error:  # a dozen classes of three libraries: HTTP, hub, file system
        raise ModelLoadError(
            f"the hub does not give {hub_id!r}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return Path(folder)


def _silent_bar() -> Any:
    """A progress bar class that shows nothing."""
    from tqdm.asyncio import tqdm_asyncio

    class SilentBar(tqdm_asyncio):  # type: ignore[type-arg]  # generic in its stubs only
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return SilentBar


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
