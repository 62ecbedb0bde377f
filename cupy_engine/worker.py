"""Weights, KV cache and slots on one device: carries out one plan after another."""

from __future__ import annotations

import numpy as np

from cupy_engine.batch import AttentionMetadata, Batch
from cupy_engine.device import Array
from cupy_engine.kv_cache import KVCache
from cupy_engine.model_registry import CausalLM
from cupy_engine.ops.last_tokens import take_last_tokens
from cupy_engine.plan import StepError, StepPlan, StepResult
from cupy_engine.pooling import Pooler
from cupy_engine.prompt_scores import PromptScores
from cupy_engine.sampler import NOTHING_ALLOWED, Sampler
from cupy_engine.slot_table import PackedStep, SlotTable
from cupy_engine.step_parts import compute_in_parts


class Worker:
    """Runs plans in NumPy. The scheduler's twin: it does what a plan says and decides nothing."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, sampler: Sampler, slots: SlotTable, num_slots: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._slots = slots
        self._last_tokens = np.zeros(num_slots, np.int32)
        self._prompt_scores = PromptScores(model, sampler)
        self._pooler = Pooler()

    def run(self, plan: StepPlan) -> StepResult:
        """Move blocks, seat sequences, compute, draw."""
        move_blocks(plan, self._kv_cache)
        self._seat(plan)
        return compute_in_parts(plan, self._compute)

    def _compute(self, plan: StepPlan) -> StepResult:
        """What may run out of memory comes before the draws, which a second try would repeat."""
        if not plan.slots:
            return StepResult(plan.step_id)
        step = self._slots.pack(plan)
        are_all_wanted = self._prompt_scores.are_wanted(plan) or self._pooler.is_wanted(plan)
        batch = self._batch(step, None if are_all_wanted else step.logits_rows)
        hidden = self._model.forward(batch, self._kv_cache)
        prompt_logprobs = self._prompt_scores.of_step(plan, hidden)
        result = self._draw(plan, step, hidden[step.logits_rows] if are_all_wanted else hidden)
        result.prompt_logprobs = prompt_logprobs
        result.embeddings = {i: vector.tobytes() for i, vector in self._pooler.of_step(plan, hidden).items()}
        return result

    def _seat(self, plan: StepPlan) -> None:
        for setup in plan.slot_setups:
            self._sampler.set_slot(setup)
        self._prompt_scores.note(plan.slot_setups)
        self._pooler.note(plan.slot_setups)
        self._sampler.set_masks(plan.masks)
        self._slots.write(plan)

    def _batch(self, step: PackedStep, output_rows: Array | None) -> Batch:
        attention = AttentionMetadata(
            query_start=step.query_start,
            context_lens=step.context_lens,
            block_tables=step.block_tables,
            slot_mapping=step.slot_mapping,
            max_query_len=int(step.query_lens.max()),
            max_context_len=int(step.context_lens.max()),
            host_query_lens=step.query_lens,
            host_context_lens=step.context_lens,
        )
        token_ids = take_last_tokens(step.token_ids, self._last_tokens)
        return Batch(token_ids, step.positions, attention, output_rows)

    def _draw(self, plan: StepPlan, step: PackedStep, hidden: Array) -> StepResult:
        if not len(step.draw_slots):
            return StepResult(plan.step_id)
        logits = self._model.compute_logits(hidden)
        drawn = self._sampler.sample(logits, step.draw_rows, step.draw_slots, step.draw_positions)
        self._last_tokens[step.draw_slots] = drawn.token_ids
        errors = {int(step.draw_sequences[i]): _step_error(message) for i, message in drawn.errors.items()}
        return StepResult(plan.step_id, drawn.token_ids.tolist(), drawn.logprobs, errors=errors)


def move_blocks(plan: StepPlan, kv_cache: KVCache) -> None:
    """Swap out, swap in, copy on write: in this order, before the step writes."""
    if plan.swap_out:
        kv_cache.swap_out(plan.swap_out)
    if plan.swap_in:
        kv_cache.swap_in(plan.swap_in)
    if plan.block_copies:
        kv_cache.copy_blocks(plan.block_copies)


def _step_error(message: str) -> StepError:
    return StepError(message, "invalid" if message == NOTHING_ALLOWED else "internal")
