"""The bytes each token adds to a text, read off a tokenizer's decoder."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from cupy_engine.errors import ModelLoadError

if TYPE_CHECKING:
    import tokenizers

_MAX_TOKEN_ID = (1 << 31) - 1
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(dict[int, bytes]):
    """Token id → bytes, found on first use and kept. Ids without a token give no bytes.

    Three families of decoders are known:

    - byte-level BPE (GPT-2, Llama 3): each character of a token stands for a byte;
    - sentencepiece (Llama 2, Mistral, Gemma): ``▁`` stands for a space, ``<0x0A>`` for a byte, and the space that
      was put before the text is taken away again;
    - no decoder (words): tokens are joined by spaces.

    Raises:
        ModelLoadError: the decoder has other steps.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._token_of = backend.id_to_token
        self._is_byte_level = False
        self._has_byte_tokens = False
        self._prefix = b""
        self._replacements: list[tuple[str, str]] = []
        self.strips_leading_space = False
        decoder = backend.decoder
        if decoder is None:
            self._prefix, self.strips_leading_space = b" ", True
            return
        spec = json.loads(decoder.__getstate__())
        for step in spec.get("decoders", [spec]):
            self._add_step(step)

    def __missing__(self, token_id: int) -> bytes:
        token = self._token_of(token_id) if 0 <= token_id <= _MAX_TOKEN_ID else None
        if token is None:
            return b""
        self[token_id] = data = self._prefix + self._encode(token)
        return data

    def _add_step(self, step: dict[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._is_byte_level = True
            case {"type": "ByteFallback"}:
                self._has_byte_tokens = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old), "prepend_scheme": scheme}:
                self._replacements.append((old, " "))
                self.strips_leading_space = scheme != "never"
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                self.strips_leading_space = start == 1
            case {"type": "Fuse"}:
                pass
            case _:
                raise ModelLoadError(f"the tokenizer's decoder has an unknown step: {step}")

    def _encode(self, token: str) -> bytes:
        if self._is_byte_level:
            table = _BYTE_OF_CHARACTER
            is_mapped = all(character in table for character in token)  # added tokens may be plain text
            return bytes(table[character] for character in token) if is_mapped else token.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
