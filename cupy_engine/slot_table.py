"""The worker's block tables by slot, and the packing of a plan into the arrays of a step.

Packing is vectorised over sequences and tokens: the only Python loops run over what does more or less than decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupy_engine.plan import StepPlan


@dataclass(slots=True)
class PackedStep:
    """A step's integers on the host, all int32. T tokens, S sequences, W block columns, R logits rows, N draws.

    A negative token id, ``-1 - slot``, stands for the token last drawn in that slot, which only the device may know.
    """

    token_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    slot_mapping: np.ndarray  # [T]
    query_start: np.ndarray  # [S + 1]
    query_lens: np.ndarray  # [S]
    context_lens: np.ndarray  # [S]
    block_tables: np.ndarray  # [S, W]
    logits_rows: np.ndarray  # [R], rows among the tokens
    draw_rows: np.ndarray  # [N], rows among the logits
    draw_slots: np.ndarray  # [N]
    draw_positions: np.ndarray  # [N], position of the token being drawn
    draw_sequences: np.ndarray  # [N], the plan's sequence that draws

    @classmethod
    def empty(cls) -> PackedStep:
        """A step of nothing, to be padded."""
        none = np.zeros(0, np.int32)
        return cls(none, none, none, np.zeros(1, np.int32), none, none, np.zeros((0, 0), np.int32), *[none] * 5)

    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token and draws one."""
        return len(self.token_ids) == len(self.query_lens) == len(self.draw_slots)

    @property
    def num_prefills(self) -> int:
        """Sequences that compute more than one token."""
        return int(np.count_nonzero(self.query_lens > 1))


class SlotTable:
    """Block tables of ``num_slots`` slots."""

    def __init__(self, num_slots: int, max_blocks_per_sequence: int, block_size: int) -> None:
        self._block_size = block_size
        self._block_tables = np.zeros((num_slots, max_blocks_per_sequence), np.int32)

    def write(self, plan: StepPlan) -> None:
        """Take in what the plan changes."""
        for write in plan.block_table_writes:
            self._block_tables[write.slot, write.first : write.first + len(write.block_ids)] = write.block_ids

    def pack(self, plan: StepPlan) -> PackedStep:
        """The arrays of a plan's sequences, in order; logits rows are the last row of each that draws."""
        slots, starts = np.array(plan.slots, np.int32), np.array(plan.starts, np.int32)
        return self._pack_chunks(plan, slots, starts) if plan.chunks else self._pack_decodes(slots, starts)

    def _pack_decodes(self, slots: np.ndarray, positions: np.ndarray) -> PackedStep:
        """Each sequence has one token, one row of logits and one draw, so all counts and indices are the same."""
        indices, context_lens = np.arange(len(slots) + 1, dtype=np.int32), positions + np.int32(1)
        rows, block_tables = indices[:-1], self._rows_of(slots, context_lens)
        return PackedStep(
            token_ids=-1 - slots,
            positions=positions,
            slot_mapping=self._places(block_tables, rows, positions),
            query_start=indices,
            query_lens=np.ones_like(slots),
            context_lens=context_lens,
            block_tables=block_tables,
            logits_rows=rows,
            draw_rows=rows,
            draw_slots=slots,
            draw_positions=context_lens,
            draw_sequences=rows,
        )

    def _pack_chunks(self, plan: StepPlan, slots: np.ndarray, starts: np.ndarray) -> PackedStep:
        """Any plan."""
        query_lens, num_draws = np.ones_like(slots), np.ones_like(slots)
        for i, chunk in plan.chunks.items():
            query_lens[i], num_draws[i] = chunk.num_tokens, len(chunk.sample_slots)
        query_start = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(query_lens, out=query_start[1:])

        owners = np.repeat(np.arange(len(slots), dtype=np.int32), query_lens)  # [T] sequence of each token
        positions = np.arange(len(owners), dtype=np.int32) + (starts - query_start[:-1])[owners]
        context_lens = starts + query_lens
        block_tables = self._rows_of(slots, context_lens)
        drawing = np.flatnonzero(num_draws).astype(np.int32)
        draw_sequences = np.repeat(drawing, num_draws[drawing])
        return PackedStep(
            token_ids=_token_ids(plan, slots, query_start),
            positions=positions,
            slot_mapping=self._places(block_tables, owners, positions),
            query_start=query_start,
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=block_tables,
            logits_rows=query_start[drawing + 1] - 1,
            draw_rows=np.repeat(np.arange(len(drawing), dtype=np.int32), num_draws[drawing]),
            draw_slots=_draw_slots(plan, slots, num_draws),
            draw_positions=context_lens[draw_sequences],
            draw_sequences=draw_sequences,
        )

    def _rows_of(self, slots: np.ndarray, context_lens: np.ndarray) -> np.ndarray:
        """[S, W] block tables, as wide as the longest context."""
        rows: np.ndarray = self._block_tables[slots, : -(-int(context_lens.max()) // self._block_size)]
        return rows

    def _places(self, block_tables: np.ndarray, owners: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[T] where each token's keys and values go: block * block_size + offset."""
        blocks, offsets = np.divmod(positions, np.int32(self._block_size))
        places: np.ndarray = block_tables[owners, blocks] * np.int32(self._block_size) + offsets
        return places


def _token_ids(plan: StepPlan, slots: np.ndarray, query_start: np.ndarray) -> np.ndarray:
    token_ids = np.empty(query_start[-1], np.int32)
    token_ids[query_start[:-1]] = -1 - slots
    for i, chunk in plan.chunks.items():
        if chunk.token_ids:
            token_ids[query_start[i] : query_start[i + 1]] = chunk.token_ids
    return token_ids


def _draw_slots(plan: StepPlan, slots: np.ndarray, num_draws: np.ndarray) -> np.ndarray:
    draw_slots, ends = np.repeat(slots, num_draws), np.cumsum(num_draws)
    for i, chunk in plan.chunks.items():
        draw_slots[ends[i] - num_draws[i] : ends[i]] = chunk.sample_slots
    return draw_slots
