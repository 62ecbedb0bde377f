"""Log-probabilities of a prompt's own tokens, for requests that ask for ``prompt_logprobs``."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cupy_engine.device import Array
from cupy_engine.messages import TokenLogprobs
from cupy_engine.model_registry import CausalLM
from cupy_engine.plan import ScheduledSequence, SlotSetup, StepPlan

ROWS_AT_A_TIME = 256  # logits [256, vocab] float32


class RowScorer(Protocol):
    """The part of a sampler that scores given tokens."""

    def prompt_logprobs(self, logits: Array, next_token_ids: np.ndarray, num_top: int) -> list[TokenLogprobs]: ...


class PromptScores:
    """Remembers the prompts of slots, and scores what a step computed of them."""

    def __init__(self, model: CausalLM, scorer: RowScorer) -> None:
        self._model = model
        self._scorer = scorer
        self._prompts: dict[int, np.ndarray] = {}

    def note(self, setups: list[SlotSetup]) -> None:
        """Take in who sits where from now on."""
        for setup in setups:
            self._prompts.pop(setup.slot, None)
            if setup.params.prompt_logprobs is not None:
                self._prompts[setup.slot] = np.array(setup.token_ids[: setup.num_prompt_tokens], np.int32)

    def are_wanted(self, plan: StepPlan) -> bool:
        """Whether any of the step's sequences asks for scores."""
        return any(chunk.num_prompt_logprobs is not None for chunk in plan.chunks.values())

    def of_step(self, plan: StepPlan, hidden: Array) -> dict[int, list[TokenLogprobs]]:
        """Scores by plan index, from the step's hidden states [T, hidden]."""
        found: dict[int, list[TokenLogprobs]] = {}
        first_row = 0
        for plan_index, sequence in enumerate(plan.sequences):
            if sequence.num_prompt_logprobs is not None:
                found[plan_index] = self._of_sequence(sequence, hidden[first_row:], sequence.num_prompt_logprobs)
            first_row += sequence.num_tokens
        return found

    def _of_sequence(self, sequence: ScheduledSequence, hidden: Array, num_top: int) -> list[TokenLogprobs]:
        # The state at position p scores the token at p + 1; hidden starts at the sequence's first row.
        next_ids = self._prompts[sequence.slot][sequence.start + 1 : sequence.start + sequence.num_tokens + 1]
        scores: list[TokenLogprobs] = []
        for start in range(0, len(next_ids), ROWS_AT_A_TIME):
            ids = next_ids[start : start + ROWS_AT_A_TIME]
            logits = self._model.compute_logits(hidden[start : start + len(ids)])
            scores.extend(self._scorer.prompt_logprobs(logits, ids, num_top))
        return scores
