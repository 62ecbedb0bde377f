"""Small tokenizers of each family, built with the tokenizers library."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<s>", "</s>", "<|end|>"]
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> Tokenizer:
    """All 256 bytes, a few merges, and special tokens 0 to 2."""
    merges = [("Ġ", "a"), ("s", "t"), ("o", "p"), ("st", "op"), ("Ã", "©"), ("ð", "Ł"), ("Ġa", "st")]
    tokens = [*SPECIAL, *_ALPHABET, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend)


def sentencepiece() -> Tokenizer:
    """As converted Llama 2 tokenizers are: bytes as <0x..>, the space as ▁, one put before the text."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁st", "st", "op", "▁stop", "é"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "a"), ("s", "t"), ("▁", "st"), ("o", "p"), ("▁st", "op")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(backend)


def metaspace() -> Tokenizer:
    tokens = [*SPECIAL, "▁", "▁hello", "▁world", "▁two", "<unk>"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _with_added(backend)


def words() -> Tokenizer:
    """No decoder: words joined by spaces."""
    tokens = [*SPECIAL, "hello", "big", "world", "<unk>"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_added(backend)


def _with_added(backend: Tokenizer) -> Tokenizer:
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend
