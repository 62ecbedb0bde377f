"""Packing a plan: which token goes where, exactly."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from cupy_engine.plan import BlockTableWrite, ScheduledSequence, StepPlan
from cupy_engine.slot_table import PackedStep, SlotTable


def table() -> SlotTable:
    """Blocks of 4: slot 0 has blocks 7 and 8, slot 2 has blocks 3, 1 and 5."""
    slots = SlotTable(num_slots=4, max_blocks_per_sequence=8, block_size=4)
    slots.write(StepPlan(0, block_table_writes=[BlockTableWrite(0, 0, [7, 8]), BlockTableWrite(2, 0, [3, 9])]))
    slots.write(StepPlan(1, block_table_writes=[BlockTableWrite(2, 1, [1, 5])]))
    return slots


def test_mixed_step() -> None:
    """A decode in slot 2 at position 9, and the chunk [2, 5) of a prompt in slot 0 that draws nothing yet."""
    sequences = [
        ScheduledSequence(slot=2, start=9, num_tokens=1, token_ids=[], sample_slots=[2]),
        ScheduledSequence(slot=0, start=2, num_tokens=3, token_ids=[11, 12, 13], sample_slots=[]),
    ]
    step = table().pack(StepPlan.of(2, sequences))
    assert step.token_ids.tolist() == [-3, 11, 12, 13]
    assert step.positions.tolist() == [9, 2, 3, 4]
    assert step.slot_mapping.tolist() == [5 * 4 + 1, 7 * 4 + 2, 7 * 4 + 3, 8 * 4 + 0]
    assert step.query_start.tolist() == [0, 1, 4]
    assert step.context_lens.tolist() == [10, 5]
    assert step.block_tables.tolist() == [[3, 1, 5], [7, 8, 0]]
    assert step.logits_rows.tolist() == [0]
    assert (step.draw_rows.tolist(), step.draw_slots.tolist(), step.draw_positions.tolist()) == ([0], [2], [10])
    assert not step.is_decode


def test_forked_prompt_draws_for_every_child() -> None:
    sequences = [
        ScheduledSequence(slot=0, start=0, num_tokens=2, token_ids=[5, 6], sample_slots=[0, 1, 3]),
        ScheduledSequence(slot=2, start=0, num_tokens=1, token_ids=[4], sample_slots=[2]),
    ]
    step = table().pack(StepPlan.of(2, sequences))
    assert step.logits_rows.tolist() == [1, 2]
    assert step.draw_rows.tolist() == [0, 0, 0, 1]
    assert step.draw_slots.tolist() == [0, 1, 3, 2]
    assert step.draw_positions.tolist() == [2, 2, 2, 1]
    assert step.draw_sequences.tolist() == [0, 0, 0, 1]


def test_steady_decode() -> None:
    """The usual case has a way of its own, to the same arrays."""
    slots, plan = table(), StepPlan(2, slots=[2, 0], starts=[8, 3])
    step = slots.pack(plan)
    assert step.is_decode
    assert step.token_ids.tolist() == [-3, -1]
    assert step.slot_mapping.tolist() == [5 * 4, 7 * 4 + 3]
    assert step.block_tables.tolist() == [[3, 1, 5], [7, 8, 0]]
    other_way = slots._pack_chunks(plan, np.array(plan.slots, np.int32), np.array(plan.starts, np.int32))
    for field in fields(PackedStep):
        ours, theirs = getattr(step, field.name), getattr(other_way, field.name)
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist()), field.name
