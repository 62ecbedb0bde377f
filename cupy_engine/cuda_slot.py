"""What the GPU sampler knows about a slot: records laid out as in ``kernels/sampling``, from a sequence's setup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cupy_engine.plan import SlotSetup
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.sampling_state import BadWords, TokenLists

SLOT = np.dtype(  # struct Slot
    [
        ("seed", np.uint64),
        ("top_p", np.float64),
        ("min_p_distance", np.float64),
        ("repetition", np.float64),
        ("inverse_repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        *((name, np.uint64) for name in ("forbidden", "listed", "edits", "counts", "words", "word_tokens", "recent")),
        ("factor", np.float32),
        ("factor_rest", np.float32),
        ("top_k", np.int32),
        ("first_stop_position", np.int32),
        ("always_edits", np.int32),
        *((name, np.int32) for name in ("num_edits", "num_words", "num_recent")),
    ]
)
SLOT_UPDATE = np.dtype(  # struct SlotUpdate
    [
        ("slot", SLOT),
        *((name, np.uint64) for name in ("lists", "list_target", "tokens")),
        *((name, np.int32) for name in ("num_list_words", "num_tokens", "num_prompt_tokens", "index")),
    ]
)
_EDIT = np.dtype([("token", np.int32), ("flags", np.int32), ("bias", np.float32)])  # struct Edit
_BAD_WORD = np.dtype([("begin", np.int32), ("length", np.int32), ("edit", np.int32)])  # struct BadWord

_IS_STOP, _ENDS_BAD_WORD = 1, 2
_MAX_FACTOR = 1e30  # temperatures below 1e-30 leave but the best token, like this one
_MAX_INT32 = (1 << 31) - 1
_SEED_MASK = (1 << 64) - 1


@dataclass(slots=True)
class SlotData:
    """A slot's record, still without addresses, and what it will point to."""

    record: np.ndarray  # SLOT, a scalar array; list fields count 4-byte words from the start of ``lists``, 0 for null
    lists: np.ndarray  # [K] int32; the first word is not used
    is_penalized: bool
    counted: np.ndarray  # [C] int32, prompt and output, if penalized
    num_prompt_tokens: int
    always_forbidden: np.ndarray | None  # [ceil(V / 32)] int32 bits, if guided: what its masks leave out besides

    @classmethod
    def of(cls, setup: SlotSetup, vocab_size: int) -> SlotData:
        """The data of a sequence taking its seat."""
        params = setup.params
        record = _numbers(params, setup.seed, setup.num_prompt_tokens)
        record["always_edits"] = params.has_penalties
        lists = TokenLists.of(setup, vocab_size)
        words = np.empty(0, np.int32) if lists is None else _lay_out(lists, record, setup.token_ids, vocab_size)
        counted = np.array(setup.token_ids if params.has_penalties else [], np.int32)
        always = _bits(_forbidden(lists, vocab_size)) if lists is not None and lists.is_guided else None
        return cls(record, words, params.has_penalties, counted, setup.num_prompt_tokens, always)


LIST_FIELDS = ("forbidden", "listed", "edits", "words", "word_tokens", "recent")


def _numbers(params: SamplingParams, seed: int, num_prompt_tokens: int) -> np.ndarray:
    record = np.zeros((), SLOT)
    record["seed"] = seed & _SEED_MASK
    record["top_p"] = params.top_p
    record["top_k"] = max(0, params.top_k)
    record["min_p_distance"] = -params.temperature * math.log(params.min_p) if params.min_p > 0.0 else np.inf
    record["repetition"] = params.repetition_penalty
    record["inverse_repetition"] = 1.0 / params.repetition_penalty
    record["frequency"] = params.frequency_penalty
    record["presence"] = params.presence_penalty
    factor = 0.0 if params.is_greedy else min(_MAX_FACTOR, math.log2(math.e) / params.temperature)
    record["factor"] = factor
    record["factor_rest"] = factor - float(record["factor"])
    record["first_stop_position"] = min(num_prompt_tokens + params.min_tokens, _MAX_INT32)
    return record


def _lay_out(lists: TokenLists, record: np.ndarray, context: Sequence[int], vocab_size: int) -> np.ndarray:
    """Put the lists one behind the other, [K] int32, and their places and sizes into the record."""
    edits = _edits(lists)
    words, word_tokens = _bad_words(lists.bad_words, edits)
    recent = _ring(lists.bad_words, len(context))
    parts = {
        "forbidden": _bits(_forbidden(lists, vocab_size)),
        "listed": _bits(_members(edits["token"], vocab_size)),
        "edits": edits.view(np.int32),
        "words": words.view(np.int32),
        "word_tokens": word_tokens,
        "recent": recent,
    }
    place = 1
    for name, part in parts.items():
        if part.size:
            record[name] = place
            place += part.size
    record["num_edits"], record["num_words"], record["num_recent"] = edits.size, words.size, recent.size
    record["always_edits"] |= lists.always_edits
    return np.concatenate([np.zeros(1, np.int32), *parts.values()])


def _forbidden(lists: TokenLists, vocab_size: int) -> np.ndarray:
    """[V] bool: never to be drawn; empty if every token may always be."""
    if lists.mask is None and not lists.is_guided:
        return _members(lists.bad_words.single, vocab_size)
    forbidden = np.zeros(vocab_size, np.bool_) if lists.mask is None else lists.mask != 0
    forbidden[lists.bad_words.single] = True
    return forbidden


def _edits(lists: TokenLists) -> np.ndarray:
    """[E] edits by ascending token: stop tokens, biases, and the last tokens of longer bad words."""
    last_tokens = np.array([last for _, last in lists.bad_words.longer], np.int32)
    tokens = np.unique(np.concatenate([lists.stops, lists.biased, last_tokens]))
    edits = np.zeros(tokens.size, _EDIT)
    edits["token"] = tokens
    edits["flags"] = np.where(np.isin(tokens, lists.stops), _IS_STOP, 0)
    edits["flags"] |= np.where(np.isin(tokens, lists.bad_words.forbidden()), _ENDS_BAD_WORD, 0)
    edits["bias"][np.searchsorted(tokens, lists.biased)] = lists.biases
    return edits


def _bad_words(bad_words: BadWords, edits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words of several tokens, [W], and what stands before their last tokens, flat, int32."""
    lengths = np.array([len(before) for before, _ in bad_words.longer], np.int32)
    words = np.zeros(lengths.size, _BAD_WORD)
    words["begin"] = np.cumsum(lengths) - lengths
    words["length"] = lengths
    words["edit"] = np.searchsorted(edits["token"], [last for _, last in bad_words.longer])
    return words, np.array([token for before, _ in bad_words.longer for token in before], np.int32)


def _ring(bad_words: BadWords, context_len: int) -> np.ndarray:
    """[max_recent] int32: the last tokens, the one at position p at index p % max_recent; -1 where there is none."""
    ring = np.full(bad_words.max_recent, -1, np.int32)
    if bad_words.recent:
        ring[np.arange(context_len - len(bad_words.recent), context_len) % bad_words.max_recent] = bad_words.recent
    return ring


def _members(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """[V] bool, true at the given ids; empty if there are none."""
    members = np.zeros(vocab_size if token_ids.size else 0, np.bool_)
    members[token_ids] = True
    return members


def _bits(flags: np.ndarray) -> np.ndarray:
    """[ceil(n / 32)] int32, bit i % 32 of word i / 32 for flag i."""
    padded = np.zeros(-(-flags.size // 32) * 4, np.uint8)
    packed = np.packbits(flags, bitorder="little")
    padded[: packed.size] = packed
    return padded.view(np.int32)
