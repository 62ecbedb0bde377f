"""Prompts as text: common English words in random order, of which most tokenizers make one token each."""

from __future__ import annotations

import random

_TEXT = """
    the of and to in is that for it as was with be by on not he his but at are this have from or had an they
    which one you were all her she there would their we him been has when who will no more if out so up said
    what its about than into them can only other time new some could these two may first then do any like my
    now over such our man me even most made after also did many off before must well back through years much
    where your way down should because long each just state those people too good make world still see own
    work here life between both being under same house day great water place small large next early young
    group often run important until children side feet car mile night walk white sea began grow took river
    four carry book hear stop without second later miss idea eat face watch
"""
_WORDS = _TEXT.split()


class PromptMaker:
    """Different prompts of ``num_words`` words; the same ones for the same seed."""

    def __init__(self, num_words: int, seed: int) -> None:
        self._num_words = num_words
        self._random = random.Random(seed)

    def next(self) -> str:
        return " ".join(self._random.choices(_WORDS, k=self._num_words))
