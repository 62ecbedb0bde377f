"""Weights, KV cache and seats on one device: carries out one plan after another."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cupy_engine.batch import Batch
from cupy_engine.device import Array
from cupy_engine.kv_cache import KVCache
from cupy_engine.messages import TokenLogprobs
from cupy_engine.plan import SlotSetup, StepError, StepPlan, StepResult
from cupy_engine.sampler import NOTHING_ALLOWED, Sampler
from cupy_engine.slot_table import SlotTable

_PROMPT_LOGPROB_ROWS = 256  # logits rows at a time: [256, vocab] float32


class Model(Protocol):
    """What a model in the registry offers. T tokens, R rows that need logits."""

    def forward(self, batch: Batch, kv_cache: KVCache) -> Array:
        """Hidden states [T, hidden] after the last norm; writes the tokens' K and V into the cache."""

    def compute_logits(self, hidden: Array) -> Array:
        """[R, hidden] → [R, vocab] float32."""


class Worker:
    """Runs plans on one device. The scheduler's twin: it does what a plan says and decides nothing."""

    def __init__(self, model: Model, kv_cache: KVCache, sampler: Sampler, slots: SlotTable) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._slots = slots
        self._setups: dict[int, SlotSetup] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """Move blocks, seat sequences, compute, draw."""
        self._move_blocks(plan)
        self._seat(plan)
        if not plan.sequences:
            return StepResult(plan.step_id, [], [])
        batch = self._slots.pack(plan.sequences)
        hidden = self._model.forward(batch, self._kv_cache)
        result = self._draw(plan, batch, hidden)
        result.prompt_logprobs = self._prompt_logprobs(plan, hidden)
        return result

    def _move_blocks(self, plan: StepPlan) -> None:
        if plan.swap_out:
            self._kv_cache.swap_out(plan.swap_out)
        if plan.swap_in:
            self._kv_cache.swap_in(plan.swap_in)
        if plan.block_copies:
            self._kv_cache.copy_blocks(plan.block_copies)

    def _seat(self, plan: StepPlan) -> None:
        for setup in plan.slot_setups:
            self._sampler.set_slot(setup)
            self._setups[setup.slot] = setup
        self._slots.write_tables(plan)

    def _draw(self, plan: StepPlan, batch: Batch, hidden: Array) -> StepResult:
        draws = self._slots.draws(plan.sequences)
        if not len(draws.rows):
            return StepResult(plan.step_id, [], [])
        logits = self._model.compute_logits(hidden[batch.logits_rows])
        drawn = self._sampler.sample(logits, draws.rows, draws.slots, draws.positions)
        self._slots.set_last_tokens(draws.slots, drawn.token_ids)
        errors = {int(draws.plan_indices[i]): _step_error(message) for i, message in drawn.errors.items()}
        return StepResult(plan.step_id, drawn.token_ids.tolist(), drawn.logprobs, errors=errors)

    def _prompt_logprobs(self, plan: StepPlan, hidden: Array) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        first_row = 0
        for plan_index, s in enumerate(plan.sequences):
            if s.num_prompt_logprobs is not None:
                setup = self._setups[s.slot]
                last = min(s.start + s.num_tokens, setup.num_prompt_tokens - 1)
                next_ids = np.array(setup.token_ids[s.start + 1 : last + 1], np.int32)
                rows = hidden[first_row : first_row + len(next_ids)]
                found[plan_index] = self._logprobs_of(rows, next_ids, s.num_prompt_logprobs)
            first_row += s.num_tokens
        return found

    def _logprobs_of(self, hidden: Array, token_ids: np.ndarray, num_top: int) -> list[TokenLogprobs]:
        logprobs: list[TokenLogprobs] = []
        for start in range(0, len(token_ids), _PROMPT_LOGPROB_ROWS):
            part = slice(start, start + _PROMPT_LOGPROB_ROWS)
            logits = self._model.compute_logits(hidden[part])
            logprobs.extend(self._sampler.prompt_logprobs(logits, token_ids[part], num_top))
        return logprobs


def _step_error(message: str) -> StepError:
    return StepError(message, "invalid" if message == NOTHING_ALLOWED else "internal")
