"""The tokenizer in a GGUF file's metadata, rebuilt for the ``tokenizers`` library.

``tokenizer.ggml.model`` is "gpt2" for byte-level BPE, whose way of splitting text before the merges is named by
``tokenizer.ggml.pre``, or "llama" for sentencepiece's BPE, which has scores in place of merges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cupy_engine.config_fields import ConfigFields
from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_SPLITS = {  # contractions | words with the sign before them | numbers | signs | line ends | other space
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_PRE_TOKENIZERS = ("default", "gpt-2", "smollm", *_SPLITS)


def build_gguf_tokenizer(gguf: GGUFFile) -> Tokenizer | None:
    """The file's tokenizer, or ``None`` if its metadata has none.

    Raises:
        ModelLoadError: a field is missing, nonsensical or names a kind of tokenizer that we do not know.
    """
    fields = ConfigFields.under("tokenizer.ggml.", gguf.metadata, gguf.path)
    if not fields.has("model"):
        return None
    model = fields.text("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise fields.error("model", f"{model!r} is not supported; {' and '.join(builders)} are")
    tokens = _tokens(fields)
    try:
        tokenizer = builders[model](fields, tokens)
        _mark_added_tokens(tokenizer, tokens, _token_types(fields, len(tokens)))
        _add_template(tokenizer, fields, tokens)
    except ModelLoadError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ModelLoadError(f"the tokenizer's metadata is not consistent: {error}", file=gguf.path) from error
    return tokenizer


def _tokens(fields: ConfigFields) -> list[str]:
    tokens = fields.values.get("tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise fields.error("tokens", "must be a list of different strings")
    return tokens


def _token_types(fields: ConfigFields, count: int) -> np.ndarray:
    types = fields.values.get("token_type", np.full(count, _NORMAL))
    return _numbers(fields, "token_type", types, count)


def _numbers(fields: ConfigFields, name: str, value: object, count: int) -> np.ndarray:
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise fields.error(name, f"must be a list of {count} numbers, one per token")
    return value


def _byte_level(fields: ConfigFields, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = fields.text("pre", default="default")
    if pre not in _PRE_TOKENIZERS:
        raise fields.error("pre", f"{pre!r} is not supported; {', '.join(_PRE_TOKENIZERS)} are")
    merges = fields.values.get("merges")
    if not isinstance(merges, list):
        raise fields.error("merges", "must be a list of strings, two tokens each")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if pre in _SPLITS:
        to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
        return Sequence([Split(Regex(_SPLITS[pre]), "isolated"), to_bytes])
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    return Sequence([Digits(individual_digits=True), gpt2]) if pre == "smollm" else gpt2


def _sentencepiece(fields: ConfigFields, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _numbers(fields, "scores", fields.values.get("scores"), len(tokens))
    is_normal = _token_types(fields, len(tokens)) == _NORMAL
    unknown_id = fields.token_id("unknown_token_id", len(tokens))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges_by_score(vocabulary, scores.tolist(), is_normal.tolist()),
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    puts_space_first = fields.flag("add_space_prefix", default=True)
    space_first = [normalizers.Prepend(_SPACE)] if puts_space_first else []
    tokenizer.normalizer = normalizers.Sequence([*space_first, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if puts_space_first else []
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, *strip])
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float], is_normal: list[bool]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored piece first, as sentencepiece merges."""
    merges = [
        (-scores[token_id], piece[:cut], piece[cut:])
        for piece, token_id in vocabulary.items()
        if is_normal[token_id]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _mark_added_tokens(tokenizer: Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    """Tokens that are found in the text before it is split."""
    from tokenizers import AddedToken

    for is_special, kinds in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        ids = np.flatnonzero(np.isin(types, kinds)).tolist()
        tokenizer.add_tokens([AddedToken(tokens[i], special=is_special, normalized=False) for i in ids])


def _add_template(tokenizer: Tokenizer, fields: ConfigFields, tokens: list[str]) -> None:
    """Put the begin and end tokens around a text, where the model was trained with them."""
    from tokenizers.processors import TemplateProcessing

    puts_bos_by_default = fields.text("model") == "llama" or fields.text("pre", default="") == "llama-bpe"
    template = ["$A"]
    special: list[tuple[str, int]] = []
    for role, by_default in (("bos", puts_bos_by_default), ("eos", False)):
        token_id = fields.token_id(f"{role}_token_id", len(tokens))
        if fields.flag(f"add_{role}_token", default=by_default) and token_id is not None:
            template = [tokens[token_id], *template] if role == "bos" else [*template, tokens[token_id]]
            special.append((tokens[token_id], token_id))
    if special:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
