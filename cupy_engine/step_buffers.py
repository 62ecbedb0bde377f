"""The integers of a step on their way to the GPU: one copy from pinned memory into arrays at fixed addresses.

host      [ token_ids | positions | … | block_tables | … ]   pinned, one of several in turn
                              │ one asynchronous copy
device    [ token_ids | positions | … | block_tables | … ]   always the same place, so graphs can read it
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.slot_table import PackedStep

_ALIGNMENT = 4  # int32s: 16 bytes


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step: T tokens, S sequences, W block table columns, R logits rows, N draws.

    ``num_prefills`` is how many of the sequences compute more than one token.
    """

    num_tokens: int
    num_sequences: int
    table_width: int
    num_rows: int
    num_draws: int
    num_prefills: int = 0

    @classmethod
    def of(cls, step: PackedStep) -> StepShape:
        num_sequences, width = step.block_tables.shape
        num_rows, num_draws = len(step.logits_rows), len(step.draw_slots)
        return cls(len(step.token_ids), num_sequences, width, num_rows, num_draws, step.num_prefills)

    @classmethod
    def decode(cls, num_sequences: int, table_width: int) -> StepShape:
        """Sequences that compute and draw one token each."""
        return cls(num_sequences, num_sequences, table_width, num_sequences, num_sequences)

    @classmethod
    def mixed(cls, num_tokens: int, max_num_sequences: int, table_width: int, num_prefills: int) -> StepShape:
        """Room for ``num_tokens`` divided in any way among sequences of which some may compute several."""
        num_sequences = min(num_tokens, max_num_sequences)
        return cls(num_tokens, num_sequences, table_width, num_sequences, num_sequences, num_prefills)

    def holds(self, other: StepShape) -> bool:
        """Whether a step of the other shape fits in."""
        return (
            other.num_tokens <= self.num_tokens
            and other.num_sequences <= self.num_sequences
            and other.table_width <= self.table_width
            and other.num_rows <= self.num_rows
            and other.num_draws <= self.num_draws
            and other.num_prefills <= self.num_prefills
        )


@dataclass(slots=True)
class StepArrays:
    """Views of a step's integers, on the host or on the device; shapes as in PackedStep."""

    token_ids: Array
    positions: Array
    slot_mapping: Array
    query_start: Array
    context_lens: Array
    block_tables: Array
    logits_rows: Array
    draw_rows: Array
    draw_slots: Array
    draw_positions: Array

    @classmethod
    def view(cls, memory: Array, shape: StepShape) -> StepArrays:
        """Lay a step of this shape out in a flat int32 array."""
        return cls(*(memory[place].reshape(lengths) for place, lengths in _layout(shape)))

    def fill(self, step: PackedStep) -> None:
        """Copy a step in; what lies beyond it becomes padding: tokens of nobody, sequences without tokens, no draws."""
        for name in _NAMES:
            source, target = getattr(step, name), getattr(self, name)
            if target.ndim == 2:
                target[: source.shape[0], : source.shape[1]] = source
                target[source.shape[0] :] = 0
            else:
                target[: len(source)] = source
                target[len(source) :] = _PADDING[name]
        self.query_start[len(step.query_start) :] = step.query_start[-1]


_NAMES = tuple(field.name for field in fields(StepArrays))
_PADDING = dict.fromkeys(_NAMES, 0) | {"slot_mapping": -1, "draw_slots": -1}


def _lengths(shape: StepShape) -> list[tuple[int, ...]]:
    tokens, sequences, draws = (shape.num_tokens,), (shape.num_sequences,), (shape.num_draws,)
    table = (shape.num_sequences, shape.table_width)
    start = (shape.num_sequences + 1,)
    return [tokens, tokens, tokens, start, sequences, table, (shape.num_rows,), draws, draws, draws]


@functools.lru_cache(maxsize=1024)
def _layout(shape: StepShape) -> list[tuple[slice, tuple[int, ...]]]:
    """Where each array lies in flat memory, and its lengths."""
    layout, offset = [], 0
    for lengths in _lengths(shape):
        size = math.prod(lengths)
        layout.append((slice(offset, offset + size), lengths))
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return layout


def num_ints(shape: StepShape) -> int:
    """int32s that a step of this shape takes."""
    end: int = _layout(shape)[-1][0].stop
    return -(-end // _ALIGNMENT) * _ALIGNMENT


class StepBuffers:
    """Memory for the largest step, once on the device and ``num_staging`` times pinned on the host.

    Args:
        largest: no step is larger in any dimension.
        num_staging: steps that may be on their way at once, plus one.
    """

    def __init__(self, largest: StepShape, num_staging: int) -> None:
        import cupy
        import cupyx

        size = num_ints(largest)
        self.memory = cupy.empty(size, np.int32)
        self._staging = [cupyx.empty_pinned(size, np.int32) for _ in range(num_staging)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(num_staging)]
        self._next = 0

    def upload(self, step: PackedStep, shape: StepShape, stream: Any) -> None:
        """Enqueue the copy of a step, padded to ``shape``. Waits only if the host is ``num_staging`` steps ahead."""
        import cupy

        index = self._next
        self._next = (index + 1) % len(self._staging)
        self._copied[index].synchronize()
        staging = self._staging[index]
        StepArrays.view(staging, shape).fill(step)
        num_bytes = 4 * num_ints(shape)
        kind = cupy.cuda.runtime.memcpyHostToDevice
        cupy.cuda.runtime.memcpyAsync(self.memory.data.ptr, staging.ctypes.data, num_bytes, kind, stream.ptr)
        self._copied[index].record(stream)
