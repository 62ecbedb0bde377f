"""Steps that memory does not hold: computed in parts, with the same outcome; hopeless ones fail alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from golden_data import tiny_model

from cupy_engine import Engine, SamplingParams
from cupy_engine.errors import EngineError
from cupy_engine.outputs import RequestOutput
from cupy_engine.plan import ScheduledSequence, StepError, StepPlan, StepResult
from cupy_engine.step_parts import compute_in_parts

MODEL = tiny_model("llama")
CASES: list[dict[str, Any]] = json.loads((MODEL / "expected.json").read_text())
PROMPTS = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]


class SmallMemory:
    """A model on a device with room for the intermediate arrays of ``max_tokens`` tokens and ``max_rows`` logits."""

    def __init__(self, model: Any, max_tokens: int, max_rows: int = 1 << 30) -> None:
        self._model = model
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.num_refused = 0

    def forward(self, batch: Any, kv_cache: Any) -> Any:
        self._check(len(batch.token_ids), self.max_tokens)
        return self._model.forward(batch, kv_cache)

    def compute_logits(self, hidden: Any) -> Any:
        self._check(len(hidden), self.max_rows)
        return self._model.compute_logits(hidden)

    def _check(self, wanted: int, most: int) -> None:
        if wanted > most:
            self.num_refused += 1
            raise MemoryError(f"injected: {wanted} of {most}")


def shrink(engine: Engine, max_tokens: int, max_rows: int = 1 << 30) -> SmallMemory:
    worker = engine._core._executor._worker  # type: ignore[attr-defined]
    worker._model = worker._prompt_scores._model = SmallMemory(worker._model, max_tokens, max_rows)
    return worker._model


def run(max_tokens: int, max_rows: int, params: SamplingParams) -> tuple[list[RequestOutput], int]:
    """Outputs, and how often memory ran out."""
    with Engine(model=str(MODEL), device="cpu", max_num_seqs=16, seed=0) as engine:
        memory = shrink(engine, max_tokens, max_rows)
        return engine.generate(PROMPTS, params), memory.num_refused


@pytest.mark.parametrize("max_tokens", [1, 7, 40])
def test_greedy_outputs_stay_what_they_are(max_tokens: int) -> None:
    outputs, num_refused = run(max_tokens, 1 << 30, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    assert num_refused > 0
    assert [output.token_ids for output in outputs] == [case["greedy_token_ids"] for case in CASES]


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(9, 1 << 30), (1 << 30, 3)])
def test_so_do_samples_and_scores(max_tokens: int, max_rows: int) -> None:
    params = SamplingParams(
        n=2,
        seed=3,
        temperature=0.9,
        repetition_penalty=1.2,
        max_tokens=8,
        logprobs=2,
        prompt_logprobs=2,
        ignore_eos=True,
    )
    expected, _ = run(1 << 30, 1 << 30, params)
    outputs, num_refused = run(max_tokens, max_rows, params)
    assert num_refused > 0
    for ours, theirs in zip(outputs, expected, strict=True):
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        assert len(ours.prompt_logprobs) == len(theirs.prompt_logprobs)
        for a, b in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert a is not None
            assert b is not None
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_a_step_without_any_memory_fails_its_requests_only() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with Engine(model=str(MODEL), device="cpu") as engine:
        memory = shrink(engine, 0)
        with pytest.raises(EngineError, match="the engine failed while computing this request"):
            engine.generate(PROMPTS[0], params)
        memory.max_tokens = 1 << 30
        outputs = engine.generate(PROMPTS, params)
        assert [output.token_ids for output in outputs] == [case["greedy_token_ids"] for case in CASES]
        stats = engine.stats()
        assert stats.num_free_kv_blocks == stats.num_kv_blocks


def test_results_of_parts_are_joined_by_sequence() -> None:
    """Sequences of 2, 5 and 1 tokens; at most 3 tokens fit; each draw gives its slot, each position a score."""

    def compute(plan: StepPlan) -> StepResult:
        if plan.num_tokens > 3:
            raise MemoryError
        result = StepResult(0)
        for i, sequence in enumerate(plan.sequences):
            positions = range(sequence.start, sequence.start + sequence.num_tokens)
            assert sequence.token_ids == [100 * sequence.slot + p for p in positions]
            result.token_ids += sequence.sample_slots
            result.logprobs += [None] * len(sequence.sample_slots)
            result.prompt_logprobs[i] = list(positions)  # type: ignore[assignment]
            if sequence.sample_slots == [7]:
                result.errors[i] = StepError("no", "invalid")
                result.embeddings[i] = b"7"
        return result

    def sequence(slot: int, start: int, end: int, *draws: int) -> ScheduledSequence:
        return ScheduledSequence(slot, start, end - start, [100 * slot + p for p in range(start, end)], list(draws))

    plan = StepPlan.of(0, [sequence(4, 3, 5, 4), sequence(5, 10, 15, 5, 6), sequence(7, 20, 21, 7)])
    result = compute_in_parts(plan, compute)
    assert result.token_ids == [4, 5, 6, 7]
    assert result.prompt_logprobs == {0: [3, 4], 1: [10, 11, 12, 13, 14], 2: [20]}
    assert result.errors == {2: StepError("no", "invalid")}
    assert result.embeddings == {2: b"7"}
