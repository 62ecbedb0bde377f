"""Steps laid out in flat memory, and padded to a batch bucket."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from cupy_engine.cuda_graph import batch_buckets, token_buckets
from cupy_engine.plan import BlockTableWrite, StepPlan
from cupy_engine.slot_table import PackedStep, SlotTable
from cupy_engine.step_buffers import StepArrays, StepShape, num_ints


def two_decodes() -> PackedStep:
    slots = SlotTable(num_slots=4, max_blocks_per_sequence=3, block_size=4)
    slots.write(StepPlan(0, block_table_writes=[BlockTableWrite(0, 0, [7, 8]), BlockTableWrite(2, 0, [3])]))
    return slots.pack(StepPlan(2, slots=[0, 2], starts=[5, 3]))


def test_exact_layout_gives_the_step_back() -> None:
    step = two_decodes()
    shape = StepShape.of(step)
    arrays = StepArrays.view(np.full(num_ints(shape), -99, np.int32), shape)
    arrays.fill(step)
    for name in ("token_ids", "positions", "slot_mapping", "query_start", "context_lens", "block_tables"):
        assert np.array_equal(getattr(arrays, name), getattr(step, name)), name
    for name in ("logits_rows", "draw_rows", "draw_slots", "draw_positions"):
        assert np.array_equal(getattr(arrays, name), getattr(step, name)), name


def test_padding_sequences_have_no_tokens_and_padding_tokens_store_nothing() -> None:
    shape = StepShape.decode(num_sequences=4, table_width=3)
    arrays = StepArrays.view(np.full(num_ints(shape), -99, np.int32), shape)
    arrays.fill(two_decodes())
    assert arrays.token_ids.tolist() == [-1, -3, 0, 0]
    assert arrays.slot_mapping.tolist() == [8 * 4 + 1, 3 * 4 + 3, -1, -1]
    assert arrays.query_start.tolist() == [0, 1, 2, 2, 2]
    assert arrays.context_lens.tolist() == [6, 4, 0, 0]
    assert arrays.draw_slots.tolist() == [0, 2, -1, -1]
    assert arrays.block_tables[:, 0].tolist() == [7, 3, 0, 0]


def test_padding_alone() -> None:
    shape = StepShape.decode(num_sequences=2, table_width=5)
    arrays = StepArrays.view(np.full(num_ints(shape), -99, np.int32), shape)
    arrays.fill(PackedStep.empty())
    assert arrays.query_start.tolist() == [0, 0, 0]
    assert arrays.context_lens.tolist() == [0, 0]
    assert arrays.block_tables.tolist() == [[0] * 5] * 2
    assert arrays.draw_slots.tolist() == [-1, -1]


def test_a_mixed_shape_holds_what_fits_in_every_dimension() -> None:
    shape = StepShape.mixed(64, 16, 10, 8)
    assert shape == StepShape(64, 16, 10, 16, 16, 8)
    assert shape.holds(shape)
    assert shape.holds(StepShape(num_tokens=60, num_sequences=2, table_width=3, num_rows=1, num_draws=1))
    for field in fields(StepShape):
        assert not shape.holds(replace(shape, **{field.name: getattr(shape, field.name) + 1})), field.name
    assert StepShape.mixed(8, 16, 10, 8).num_sequences == 8


def test_token_buckets_end_with_the_largest_step() -> None:
    assert token_buckets(20) == [20]
    assert token_buckets(300) == [32, 64, 128, 256, 300]
    assert token_buckets(2048)[-4:] == [1280, 1536, 1792, 2048]


def test_buckets_end_with_the_largest_batch() -> None:
    assert batch_buckets(1) == [1]
    assert batch_buckets(20) == [1, 2, 4, 8, 16, 20]
    assert batch_buckets(256)[-3:] == [224, 240, 256]
