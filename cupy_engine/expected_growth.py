"""Whether the blocks will last until running sequences end: who comes in too early is pushed out again, at a price.

All grow by a token a step, until one ends and gives its blocks back. So the need peaks when one is about to end:

    blocks │      ╱│   ╱│
           │    ╱  │ ╱  │ ╱│
           │  ╱    ╱    │╱ └──
           └───────────────────▶ steps

How much a sequence will generate is not known: as much as others did lately, on average, but no more than it may. The
peak is that of Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

from cupy_engine.block_manager import BlockManager
from cupy_engine.request import Sequence

_FIRST_GUESS = 256.0  # tokens of output, until some sequences have ended
_WEIGHT_OF_NEW = 0.05


class ExpectedGrowth:
    """Learns from sequences that end, and foresees what those that run will need."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._num_output_tokens = _FIRST_GUESS

    def observe(self, sequence: Sequence) -> None:
        """A sequence has come to its end, on its own or at its limit."""
        self._num_output_tokens += _WEIGHT_OF_NEW * (sequence.num_output_tokens - self._num_output_tokens)

    def leaves_room_for(self, newcomers: Many[Sequence], num_blocks: int, running: Many[Sequence]) -> bool:
        """Whether newcomers, who share a prompt that takes ``num_blocks`` of the free ones, can grow beside others."""
        manager = self._manager
        num_spare = manager.num_free_blocks - num_blocks - self._num_lacking_blocks(running)
        most_each = 1 + manager.num_blocks_for(self._num_expected_tokens(0))
        if (len(running) + len(newcomers)) * most_each <= num_spare:
            return True
        everyone = [*map(self._foresee, running), *map(self._foresee, newcomers)]
        if sum(ahead.num_more_blocks for ahead in everyone) <= num_spare:
            return True
        num_in_use = manager.num_blocks - num_spare
        share = min(1.0, num_in_use / sum(ahead.num_blocks for ahead in everyone))
        return _peak(everyone, manager.block_size, share) <= num_spare

    def _num_lacking_blocks(self, running: Many[Sequence]) -> int:
        """Blocks that those whose prompts are computed in part still need for the rest."""
        manager = self._manager
        return sum(
            manager.num_blocks_for(sequence.num_tokens) - manager.num_blocks_of(sequence.sequence_id)
            for sequence in running
            if sequence.is_prefilling
        )

    def _num_expected_tokens(self, num_output_tokens: int) -> int:
        """How much a sequence with so much output is expected to generate yet."""
        return max(round(self._num_output_tokens) - num_output_tokens, self._manager.block_size)

    def _foresee(self, sequence: Sequence) -> _Ahead:
        manager, num_tokens = self._manager, sequence.num_tokens
        num_blocks = manager.num_blocks_for(num_tokens)
        num_more = self._num_expected_tokens(num_tokens - sequence.num_prompt_tokens)
        num_more = min(num_more, sequence.request.max_num_tokens - num_tokens)
        num_more_blocks = manager.num_blocks_for(num_tokens + num_more) - num_blocks
        return _Ahead(num_more, num_blocks, num_more_blocks, num_blocks * manager.block_size - num_tokens)


class _Ahead(NamedTuple):
    """What a sequence is expected to do: generate ``num_more_tokens``, of which some have a place already."""

    num_more_tokens: int
    num_blocks: int  # for the tokens that it has
    num_more_blocks: int
    num_places: int


def _peak(everyone: list[_Ahead], block_size: int, share: float) -> float:
    """The most blocks needed on top of those in use.

    ``share``: of the blocks of a sequence that ends, how many nobody else uses.
    """
    peak = freed = 0.0
    num_growing, num_places = len(everyone), sum(ahead.num_places for ahead in everyone)
    for ahead in sorted(everyone):
        grown = num_growing * (ahead.num_more_tokens / block_size + 0.5) - num_places / block_size
        peak = max(peak, grown - freed)
        freed += share * ahead.num_blocks
        num_growing -= 1
        num_places -= ahead.num_places
    return peak
