"""Structured outputs inside the engine: which tokens a grammar allows next, worked out beside the engine's loop.

loop       open()                      accept(token) … accept(token)               collect(): masks that are ready
threads      └─ compile, first mask ─┐              └─ advance each, next masks ─┐    ▲
             └────────────────────────┴──────────────────────────────────────────┴────┘

A sequence draws only while its mask is known: it is not scheduled ahead of its last token.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cupy_engine.structured_outputs import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILE_S = 5.0
MAX_CACHED_GRAMMARS = 32
_MAX_LEXER_STATES = 100_000  # some 40 MB; what needs more is no grammar that people write
_NUM_COMPILE_THREADS = 2
_NUM_MASK_THREADS = 4


@dataclass(eq=False, slots=True)
class Guide:
    """One sequence's place in its grammar. Changes on the loop's thread only.

    ``mask``: the tokens allowed next, bit ``i % 8`` of byte ``i // 8`` for token i; ``None`` while it is worked out.
    """

    request_id: str
    grammar: Grammar
    moves: list[tuple[Guide, int]]  # tokens accepted since the last collect(), shared by all guides
    matcher: LLMatcher | None = None
    mask: bytes | None = None

    def accept(self, token_id: int) -> None:
        """Move past a token that the mask allowed."""
        self.mask = None
        self.moves.append((self, token_id))

    def fails(self, problem: str) -> GuideError:
        return GuideError(self.request_id, self.grammar.param, f"{self.grammar.param} {problem}")

    def fork(self) -> Guide:
        """A guide at the same place that moves on its own."""
        assert self.matcher is not None, "a guide forks where its mask is known"
        return Guide(self.request_id, self.grammar, self.moves, self.matcher.deep_copy(), self.mask)


@dataclass(frozen=True, slots=True)
class GuideError:
    """Why a request can get no more masks."""

    request_id: str
    param: str
    message: str


@dataclass(slots=True)
class _Compiling:
    """Guides that wait for one grammar, and since when a thread has been at it."""

    guides: list[Guide]
    start_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class _Compiled:
    text: str
    matcher: LLMatcher | None = None
    mask: bytes = b""
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Moved:
    guide: Guide
    mask: bytes = b""
    error: str = ""


class Guides:
    """All guides of an engine. One thread calls; others work.

    Args:
        load_vocabulary: the model's tokens as the grammar library wants them; called once, when first needed.
        vocab_size: V, the width of the logits.
    """

    def __init__(self, load_vocabulary: Callable[[], LLTokenizer], vocab_size: int) -> None:
        self._load_vocabulary = load_vocabulary
        self._num_mask_bytes = (vocab_size + 31) // 32 * 4
        self._vocabulary: LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()
        self._cache: OrderedDict[str, tuple[LLMatcher, bytes]] = OrderedDict()
        self._compilers = ThreadPoolExecutor(_NUM_COMPILE_THREADS, "cupy-engine-grammar")
        self._movers = ThreadPoolExecutor(_NUM_MASK_THREADS, "cupy-engine-mask")
        self._moves: list[tuple[Guide, int]] = []
        self._num_moving = 0
        self._compiling: dict[str, _Compiling] = {}
        self._done: queue.SimpleQueue[_Compiled | _Moved] = queue.SimpleQueue()

    def open(self, request_id: str, grammar: Grammar) -> Guide:
        """A guide at the start of an output."""
        guide = Guide(request_id, grammar, self._moves)
        text = grammar.text
        if (cached := self._cache.get(text)) is not None:
            self._cache.move_to_end(text)
            guide.matcher, guide.mask = cached[0].deep_copy(), cached[1]
        elif (compiling := self._compiling.get(text)) is not None:
            compiling.guides.append(guide)
        else:
            self._compiling[text] = compiling = _Compiling([guide])
            self._compilers.submit(self._compile, text, compiling)
        return guide

    def collect(self, patience_s: float = 0.0) -> list[GuideError]:
        """Give guides their masks. Waits at most this long, for masks only: a grammar may take seconds."""
        self._start_moves()
        errors = self._late()
        end_s = time.monotonic() + patience_s
        while self._num_moving or self._compiling:
            wait_s = max(0.0, end_s - time.monotonic()) if self._num_moving else 0.0
            try:
                errors += self._take(self._done.get(timeout=wait_s))
            except queue.Empty:
                break
        return errors

    def wait(self, timeout_s: float) -> list[GuideError]:
        """Wait until something is ready; returns at once if nothing is under way."""
        self._start_moves()
        if not self._num_moving and not self._compiling:
            return []
        try:
            return self._take(self._done.get(timeout=timeout_s))
        except queue.Empty:
            return self._late()

    def close(self) -> None:
        """Begin nothing more; what has begun ends by itself."""
        for pool in (self._compilers, self._movers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _start_moves(self) -> None:
        moves = list(self._moves)
        self._moves.clear()
        self._num_moving += len(moves)
        num_parts = min(_NUM_MASK_THREADS, len(moves))
        for part in range(num_parts):
            self._movers.submit(self._move, moves[part::num_parts])

    def _take(self, done: _Compiled | _Moved) -> list[GuideError]:
        if isinstance(done, _Compiled):
            return self._take_compiled(done)
        self._num_moving -= 1
        done.guide.mask = done.mask or None
        return [done.guide.fails(done.error)] if done.error else []

    def _take_compiled(self, done: _Compiled) -> list[GuideError]:
        compiling = self._compiling.pop(done.text, None)
        guides = [] if compiling is None else compiling.guides  # none if it was late
        if done.matcher is None:
            return [guide.fails(done.error) for guide in guides]
        for guide in guides:
            guide.matcher, guide.mask = done.matcher.deep_copy(), done.mask
        self._cache[done.text] = done.matcher, done.mask
        if len(self._cache) > MAX_CACHED_GRAMMARS:
            self._cache.popitem(last=False)
        return []

    def _late(self) -> list[GuideError]:
        """Give up on grammars that take too long; their threads end by themselves, as the library has limits too."""
        now_s = time.monotonic()
        late = [text for text, each in self._compiling.items() if now_s - each.start_s > MAX_COMPILE_S]
        guides = [guide for text in late for guide in self._compiling.pop(text).guides]
        return [guide.fails(f"takes more than {MAX_COMPILE_S:g} s to compile") for guide in guides]

    # On other threads. They must not die of anything, a panic of the library (a BaseException) included.

    def _compile(self, text: str, compiling: _Compiling) -> None:
        from llguidance import LLMatcher, LLParserLimits

        try:
            vocabulary = self._open_vocabulary()
            compiling.start_s = time.monotonic()
            limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
            matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)
            self._done.put(_Compiled(text, matcher, self._mask_of(matcher)))
        except BaseException as error:
            self._done.put(_Compiled(text, error=_sentence(error)))

    def _move(self, moves: Iterable[tuple[Guide, int]]) -> None:
        for guide, token_id in moves:
            matcher = guide.matcher
            assert matcher is not None
            try:
                matcher.consume_token(token_id)
                self._done.put(_Moved(guide, self._mask_of(matcher)))
            except BaseException as error:
                self._done.put(_Moved(guide, error=_sentence(error)))

    def _mask_of(self, matcher: LLMatcher) -> bytes:
        """Raises ValueError if the grammar is wrong, or has become too much to follow."""
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            error = matcher.get_error()
            raise ValueError("no text fits it" if error.startswith("NoExtension") else error)
        return mask[: self._num_mask_bytes].ljust(self._num_mask_bytes, b"\0")

    def _open_vocabulary(self) -> LLTokenizer:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._load_vocabulary()
            return self._vocabulary


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "is refused: " + (text if len(text) <= 300 else text[:297] + "...")
