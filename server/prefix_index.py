"""Which replica has seen which prompt prefix: a router's guess at what is in their prefix caches."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

CHUNK_TOKENS = 32
MAX_CHUNKS = 256
MAX_ENTRIES = 1 << 16


class PrefixIndex:
    """Remembers, for each prefix of whole chunks, who got it last. The least recently used entries go first.

    Thread-safe. It is a hint: a wrong guess costs a prefill, no more, so a plain hash will do.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._seen: OrderedDict[int, set[Hashable]] = OrderedDict()
        self._lock = threading.Lock()

    def num_known_tokens(self, prompt: Sequence[int], salt: str) -> dict[Hashable, int]:
        """How many of the prompt's first tokens each replica has seen; those that have seen none are left out."""
        known: dict[Hashable, int] = {}
        with self._lock:
            candidates: set[Hashable] | None = None
            for count, prefix in enumerate(_prefixes(prompt, salt), start=1):
                seen = self._seen.get(prefix, set())
                candidates = set(seen) if candidates is None else candidates & seen
                if not candidates:
                    break
                known |= dict.fromkeys(candidates, count * CHUNK_TOKENS)
        return known

    def note(self, prompt: Sequence[int], salt: str, replica: Hashable) -> None:
        """The prompt went to ``replica``."""
        with self._lock:
            for prefix in _prefixes(prompt, salt):
                self._seen.setdefault(prefix, set()).add(replica)
                self._seen.move_to_end(prefix)
            while len(self._seen) > self._max_entries:
                self._seen.popitem(last=False)

    def forget(self, replica: Hashable) -> None:
        """It has lost its cache."""
        with self._lock:
            for seen in self._seen.values():
                seen.discard(replica)


def _prefixes(prompt: Sequence[int], salt: str) -> Iterator[int]:
    """One number for each prefix of whole chunks."""
    value = hash(salt)
    for end in itertools.islice(range(CHUNK_TOKENS, len(prompt) + 1, CHUNK_TOKENS), MAX_CHUNKS):
        value = hash((value, *prompt[end - CHUNK_TOKENS : end]))
        yield value
