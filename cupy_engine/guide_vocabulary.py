"""A model's tokens as the grammar library wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cupy_engine.config import EngineConfig
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_source import ModelFiles, resolve_tokenizer
from cupy_engine.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def load_vocabulary(config: EngineConfig, files: ModelFiles, model: ModelConfig) -> LLTokenizer:
    """Raises ValueError if the model has no tokenizer, or no token to end with."""
    from llguidance import LLTokenizer, TokenizerWrapper

    tokenizer = load_tokenizer(resolve_tokenizer(config.tokenizer, files))
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so there are no texts to follow a grammar")
    ends = [token_id for token_id in model.eos_token_ids if token_id < model.vocab_size]
    if not ends:
        raise ValueError("this model has no end-of-sequence token, so it cannot end what follows a grammar")
    wrapper = TokenizerWrapper(_Tokens(tokenizer, model.vocab_size, ends[0]))
    return LLTokenizer(wrapper, n_vocab=model.vocab_size, eos_token=ends, slices=LLTokenizer.json_slices())


class _Tokens:
    """What the library asks of a tokenizer. Special tokens stand for no text, so no grammar allows them by accident."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = [token_id for token_id in range(vocab_size) if tokenizer.is_special(token_id)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)
