"""Which engine has seen which prompt prefix: what all workers of a server guess to be in prefix caches.

    FOLDER/prefixes     shared memory: slots of 64 bits, each with the hash of a prefix and of the engine that got it

A hash has one slot, and the latest stays in it. Nothing is locked and nothing is forgotten: an engine that has lost its
cache is another process. It is a hint: a wrong guess costs a prefill, no more, so plain hashes will do.
"""

from __future__ import annotations

import itertools
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

FILE = "prefixes"
CHUNK_TOKENS = 32
MAX_CHUNKS = 256
NUM_SLOTS = 1 << 18


class PrefixIndex:
    """Remembers who got which prefixes of whole chunks. Any thread of any worker.

    Args:
        folder: private to the server.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, folder: Path, num_slots: int = NUM_SLOTS) -> None:
        file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, 8 * num_slots)  # or a write without room would kill the worker
            self._slots = memoryview(mmap.mmap(file, 8 * num_slots)).cast("Q")
        finally:
            os.close(file)

    def num_known_tokens(self, prompt: Sequence[int], salt: str, engines: Iterable[int]) -> dict[int, int]:
        """How many of the prompt's first tokens each of the engines, named by process id, has seen."""
        prefixes = list(_prefixes(prompt, salt))
        counts = range(len(prefixes), 0, -1)  # the longest first: slots of shorter ones may have been taken since
        return {
            engine: CHUNK_TOKENS * next((n for n in counts if self._has(prefixes[n - 1], engine)), 0)
            for engine in engines
        }

    def note(self, prompt: Sequence[int], salt: str, engine: int) -> None:
        """The prompt went to ``engine``."""
        for prefix in _prefixes(prompt, salt):
            value = _value(prefix, engine)
            self._slots[value % len(self._slots)] = value

    def _has(self, prefix: int, engine: int) -> bool:
        value = _value(prefix, engine)
        return self._slots[value % len(self._slots)] == value


def _value(prefix: int, engine: int) -> int:
    return hash((prefix, engine)) & 0xFFFF_FFFF_FFFF_FFFF


def _prefixes(prompt: Sequence[int], salt: str) -> Iterator[int]:
    """One number for each prefix of whole chunks, the same in every process: hashes of texts are not."""
    value = zlib.crc32(salt.encode())
    for end in itertools.islice(range(CHUNK_TOKENS, len(prompt) + 1, CHUNK_TOKENS), MAX_CHUNKS):
        value = hash((value, *prompt[end - CHUNK_TOKENS : end]))
        yield value
