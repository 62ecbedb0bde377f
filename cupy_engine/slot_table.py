"""The worker's seats: per slot a block table row and the last token; packs a plan into the arrays of a batch.

Packing is vectorised over sequences and tokens: the only Python loops run over what a plan lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupy_engine.batch import AttentionMetadata, Batch
from cupy_engine.device import Array, Device
from cupy_engine.plan import ScheduledSequence, StepPlan


@dataclass(slots=True)
class Draws:
    """Which token is drawn from which logits. N draws.

    ``plan_indices[i]`` is the scheduled sequence that draw i belongs to.
    """

    rows: np.ndarray  # [N] int32, row among the batch's logits rows
    slots: np.ndarray  # [N] int32
    positions: np.ndarray  # [N] int32, position of the token being drawn
    plan_indices: np.ndarray  # [N] int32


class SlotTable:
    """Block tables and last tokens of ``num_slots`` seats."""

    def __init__(self, num_slots: int, max_blocks_per_sequence: int, block_size: int, device: Device) -> None:
        self._block_size = block_size
        self._device = device
        self._block_tables = np.zeros((num_slots, max_blocks_per_sequence), np.int32)
        self._last_tokens = np.zeros(num_slots, np.int32)

    def write_tables(self, plan: StepPlan) -> None:
        for write in plan.block_table_writes:
            self._block_tables[write.slot, write.first : write.first + len(write.block_ids)] = write.block_ids

    def set_last_tokens(self, slots: np.ndarray, token_ids: Array) -> None:
        self._last_tokens[slots] = token_ids

    def pack(self, sequences: list[ScheduledSequence]) -> Batch:
        """The batch of a plan's sequences, in order; logits rows are the last row of each that draws."""
        slots = np.array([s.slot for s in sequences], np.int32)
        starts = np.array([s.start for s in sequences], np.int32)
        query_lens = np.array([s.num_tokens for s in sequences], np.int32)
        query_start = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(query_lens, out=query_start[1:])
        num_tokens = int(query_start[-1])

        owners = np.repeat(np.arange(len(sequences), dtype=np.int32), query_lens)  # [T] sequence of each token
        positions = np.arange(num_tokens, dtype=np.int32) + (starts - query_start[:-1])[owners]
        context_lens = starts + query_lens
        max_context_len = int(context_lens.max())
        block_tables = self._block_tables[slots, : -(-max_context_len // self._block_size)]
        blocks, offsets = np.divmod(positions, np.int32(self._block_size))
        slot_mapping = block_tables[owners, blocks] * np.int32(self._block_size) + offsets
        logits_rows = np.array([query_start[i + 1] - 1 for i, s in enumerate(sequences) if s.sample_slots], np.int32)

        put = self._device.asarray
        attention = AttentionMetadata(
            query_start=put(query_start),
            context_lens=put(context_lens),
            block_tables=put(block_tables),
            slot_mapping=put(slot_mapping),
            max_query_len=int(query_lens.max()),
            max_context_len=max_context_len,
            host_query_lens=query_lens,
            host_context_lens=context_lens,
        )
        token_ids = self._token_ids(sequences, slots, query_start)
        return Batch(put(token_ids), put(positions), attention, put(logits_rows))

    def _token_ids(self, sequences: list[ScheduledSequence], slots: np.ndarray, query_start: np.ndarray) -> np.ndarray:
        token_ids = np.empty(query_start[-1], np.int32)
        if not any(s.token_ids for s in sequences):  # every sequence continues with the token it drew last
            token_ids[:] = self._last_tokens[slots]
            return token_ids
        for i, s in enumerate(sequences):
            token_ids[query_start[i] : query_start[i + 1]] = s.token_ids or self._last_tokens[s.slot]
        return token_ids

    def draws(self, sequences: list[ScheduledSequence]) -> Draws:
        """Who draws from the logits rows that :meth:`pack` chose."""
        drawing = [i for i, s in enumerate(sequences) if s.sample_slots]
        draws = [
            (row, slot, sequences[i].start + sequences[i].num_tokens, i)
            for row, i in enumerate(drawing)
            for slot in sequences[i].sample_slots
        ]
        rows, slots, positions, plan_indices = np.array(draws, np.int32).reshape(-1, 4).T
        return Draws(rows, slots, positions, plan_indices)
