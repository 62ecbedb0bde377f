"""The tokens with a role: what ``bos_token``, ``eos_token`` and their like are in a model."""

from __future__ import annotations

from typing import Any

from cupy_engine.gguf_file import GGUFFile, read_gguf
from cupy_engine.json_file import read_json_object
from cupy_engine.model_source import ModelFiles

_GGUF_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # so spelled in the format
}
_HF_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_special_tokens(files: ModelFiles) -> dict[str, str]:
    """Role → the token's text, for the roles that the model fills.

    Raises:
        ModelLoadError: a file is not JSON; names it.
    """
    if files.gguf is not None:
        return _from_gguf(read_gguf(files.gguf))
    assert files.folder is not None
    found: dict[str, str] = {}
    for file in (files.folder / "special_tokens_map.json", files.folder / "tokenizer_config.json"):
        if file.is_file():
            found |= _from_json(read_json_object(file))
    return found


def _from_json(values: dict[str, Any]) -> dict[str, str]:
    """A token is its text, or an object with its text as ``content``."""
    tokens = {role: values.get(role) for role in _HF_ROLES}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _from_gguf(gguf: GGUFFile) -> dict[str, str]:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    vocabulary = tokens if isinstance(tokens, list) else []
    ids = {role: gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in _GGUF_ROLES.items()}
    return {
        role: vocabulary[token_id]
        for role, token_id in ids.items()
        if isinstance(token_id, int) and 0 <= token_id < len(vocabulary)
    }
