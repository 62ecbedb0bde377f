"""Text to token ids and back, for one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cupy_engine.errors import InvalidRequestError, ModelLoadError
from cupy_engine.gguf_file import read_gguf
from cupy_engine.gguf_tokenizer import build_gguf_tokenizer
from cupy_engine.model_source import ModelFiles
from cupy_engine.special_tokens import load_special_tokens
from cupy_engine.token_bytes import TokenBytes

if TYPE_CHECKING:
    import tokenizers

LONG_TEXT_CHARS = 1 << 14
_TOKENIZER_FILE = "tokenizer.json"
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once.

    Decoding joins the tokens' bytes and reads them as UTF-8. On valid UTF-8 that is what the ``tokenizers`` library
    gives; broken sequences become U+FFFD by Unicode's rules, whatever the tokenizer, so that text can be streamed.

    Args:
        backend: a tokenizer of the ``tokenizers`` library.
        special_tokens: role (``bos_token``) → text, from :func:`cupy_engine.special_tokens.load_special_tokens`.

    Raises:
        ModelLoadError: the tokenizer decodes in a way that we do not know.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] = MappingProxyType({})) -> None:
        backend.no_truncation()
        backend.no_padding()
        _forgo_cache(backend)
        self._backend = backend
        self._bytes = TokenBytes(backend)
        self._long_texts = ThreadPoolExecutor(1, "cupy-engine-long-text")
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        roles = ("bos_token", "eos_token", "pad_token")
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (self._id_of(special_tokens.get(r)) for r in roles)

    @property
    def strips_leading_space(self) -> bool:
        """Whether a text's first space stands for no character: sentencepiece puts one before every text."""
        return self._bytes.strips_leading_space

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens that are written in it are recognized.

        The library takes up to 400 bytes for a character, half of which stay with the thread's heap. So long texts are
        encoded one after another on a thread of their own, or some large ones at a time would use up the memory.

        Raises:
            InvalidRequestError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            if len(text) > LONG_TEXT_CHARS:
                return self._long_texts.submit(self._encode, text, add_special_tokens).result()
            return self._encode(text, add_special_tokens)
        except TypeError as error:
            raise InvalidRequestError("prompt", "the text is not valid Unicode: it holds a lone surrogate") from error

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids without a token count for nothing."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped)
        return (data.removeprefix(b" ") if self.strips_leading_space else data).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text: possibly part of a UTF-8 character; nothing for an id without a token."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text for display, U+FFFD where they are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written so; ``None`` if there is none."""
        token_id = self._id_of(text)
        return token_id if token_id in self._special_ids else None

    @cached_property
    def max_token_chars(self) -> int:
        """No token stands for more characters of a text."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _id_of(self, token: str | None) -> int | None:
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id


def _forgo_cache(backend: tokenizers.Tokenizer) -> None:
    """Have the library keep no words: each thread would keep 10,000 of its own, and a client can make those 80 MB."""
    resize = getattr(backend.model, "_resize_cache", None)  # of models that merge or search
    if resize is not None:
        resize(0)


def load_tokenizer(files: ModelFiles) -> Tokenizer | None:
    """The model's tokenizer; ``None`` if it has none and so serves token ids.

    Raises:
        ModelLoadError: a file is broken, or the tokenizer is of a kind that we cannot read; names the file.
    """
    if files.gguf is not None:
        backend = build_gguf_tokenizer(read_gguf(files.gguf))
    else:
        assert files.folder is not None
        backend = _read_folder(files.folder)
    return None if backend is None else Tokenizer(backend, load_special_tokens(files))


def _read_folder(folder: Path) -> tokenizers.Tokenizer | None:
    file = folder / _TOKENIZER_FILE
    if not file.is_file():
        others = [name for name in _OTHER_TOKENIZER_FILES if (folder / name).is_file()]
        if others:
            raise ModelLoadError(f"{others[0]} cannot be read; convert it to {_TOKENIZER_FILE}", file=folder)
        return None
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ModelLoadError(f"is not a readable tokenizer: {error}", file=file) from error
