"""One vector for a whole prompt, for requests that ask for an embedding instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupy_engine.device import Array
from cupy_engine.messages import Pooling
from cupy_engine.plan import ScheduledSequence, SlotSetup, StepPlan

_ROWS_AT_A_TIME = 512  # copies [512, H] float32


@dataclass(slots=True)
class _Pool:
    """A slot's hidden states so far: their sum, for the mean."""

    pooling: Pooling
    num_tokens: int
    total: Array = 0.0  # [H] float32, once there are any


class Pooler:
    """Remembers which slots are pooled, and adds up what a step computed of them: a prompt may come in chunks."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def note(self, setups: list[SlotSetup]) -> None:
        """Take in who sits where from now on."""
        for setup in setups:
            self._pools.pop(setup.slot, None)
            if setup.pooling is not None:
                self._pools[setup.slot] = _Pool(setup.pooling, setup.num_prompt_tokens)

    def is_wanted(self, plan: StepPlan) -> bool:
        """Whether any of the step's sequences is pooled."""
        return bool(self._pools) and any(chunk.slot in self._pools for chunk in plan.chunks.values())

    def of_step(self, plan: StepPlan, hidden: Array) -> dict[int, Array]:
        """Vectors [H] float32 by plan index, of the prompts that end in this step; hidden [T, H] are its states."""
        found: dict[int, Array] = {}
        first_row = 0
        for plan_index, sequence in enumerate(plan.sequences if self._pools else ()):
            if sequence.slot in self._pools:
                vector = self._add(self._pools[sequence.slot], sequence, hidden[first_row:][: sequence.num_tokens])
                if vector is not None:
                    found[plan_index] = vector
            first_row += sequence.num_tokens
        return found

    def _add(self, pool: _Pool, sequence: ScheduledSequence, rows: Array) -> Array | None:
        is_end = sequence.start + sequence.num_tokens == pool.num_tokens
        if pool.pooling == "last":
            return rows[-1].astype(np.float32) if is_end else None
        for first in range(0, len(rows), _ROWS_AT_A_TIME):
            pool.total += rows[first : first + _ROWS_AT_A_TIME].astype(np.float32).sum(axis=0)
        return pool.total / np.float32(pool.num_tokens) if is_end else None


def unit_vector(embedding: bytes, num_dimensions: int | None = None) -> np.ndarray:
    """The first dimensions of a vector, [D] float32, scaled to length 1.

    Raises:
        ValueError: a value is not finite.
    """
    vector = np.frombuffer(embedding, np.float32)[:num_dimensions]
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm):
        raise ValueError("the model gave hidden states that are not finite")
    return vector / np.float32(norm or 1.0)
