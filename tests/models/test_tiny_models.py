"""Every tiny model against transformers: logits, prompt log-probabilities, greedy tokens; however the prompt is cut."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden_data import TINY_MODELS, tiny_model
from paged_run import PagedRun, Sequence

TOLERANCE = 2e-3


def expected(name: str) -> list[dict[str, Any]]:
    return json.loads((tiny_model(name) / "expected.json").read_text())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def check_prompt(logits: np.ndarray, case: dict[str, Any]) -> None:
    np.testing.assert_allclose(logits[-1], case["last_logits"], atol=TOLERANCE, rtol=0)
    next_ids = case["prompt_token_ids"][1:]
    logprobs = log_softmax(logits[:-1])[np.arange(len(next_ids)), next_ids]
    np.testing.assert_allclose(logprobs, case["prompt_logprobs"], atol=TOLERANCE, rtol=0)


def check_greedy(run: PagedRun, sequence: Sequence, logits: np.ndarray, case: dict[str, Any]) -> None:
    if case["min_margin"] > TOLERANCE:
        wanted = case["greedy_token_ids"]
        assert run.greedy(sequence, logits[-1], len(wanted)) == wanted


@pytest.mark.parametrize("name", TINY_MODELS)
def test_whole_prompts_in_order(name: str) -> None:
    run = PagedRun.open(tiny_model(name))
    for case in expected(name):
        sequence = Sequence(list(case["prompt_token_ids"]))
        (logits,) = run.step([(sequence, len(sequence.token_ids))])
        check_prompt(logits, case)
        check_greedy(run, sequence, logits, case)


@pytest.mark.parametrize("chunk", [1, 5, 16, 33])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_prompts_in_chunks_over_scattered_blocks(name: str, chunk: int) -> None:
    run = PagedRun.open(tiny_model(name), scatter_seed=chunk)
    for case in expected(name):
        sequence = Sequence(list(case["prompt_token_ids"]))
        pieces = []
        while sequence.num_computed < len(sequence.token_ids):
            n = min(chunk, len(sequence.token_ids) - sequence.num_computed)
            pieces += run.step([(sequence, n)])
        logits = np.concatenate(pieces)
        check_prompt(logits, case)
        check_greedy(run, sequence, logits, case)


@pytest.mark.parametrize("rows", [[0], [4, 21], [21], []])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_only_the_states_that_are_asked_for_are_computed_to_the_end(name: str, rows: list[int]) -> None:
    case = max(expected(name), key=lambda case: len(case["prompt_token_ids"]))
    token_ids = case["prompt_token_ids"]
    every, few = (PagedRun.open(tiny_model(name)) for _ in range(2))
    (wanted,) = every.step([(Sequence(list(token_ids)), 22)])
    last, sequence, num_rows = few.model.layers[-1], Sequence(list(token_ids)), []
    mlp, last.mlp = last.mlp, lambda x: num_rows.append(len(x)) or mlp(x)
    logits = few.logits([(sequence, 22)], np.array(rows, np.int32))
    assert num_rows == [len(rows)]
    np.testing.assert_allclose(logits, wanted[rows], atol=1e-5, rtol=0)
    rest = len(token_ids) - 22
    np.testing.assert_allclose(few.step([(sequence, rest)])[0][-1], case["last_logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_mixed_batches_of_prefill_chunks_and_decodes(name: str) -> None:
    run = PagedRun.open(tiny_model(name), scatter_seed=7)
    cases = expected(name)
    prompt_lens = [len(case["prompt_token_ids"]) for case in cases]
    sequences = [Sequence(case["prompt_token_ids"] + case["greedy_token_ids"]) for case in cases]
    rows: list[list[np.ndarray]] = [[] for _ in cases]
    while live := [i for i, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        # teacher-forced: chunks of 23 while in the prompt, then single tokens, all sequences side by side
        counts = [max(1, min(23, prompt_lens[i] - sequences[i].num_computed)) for i in live]
        for i, logits in zip(
            live, run.step([(sequences[i], n) for i, n in zip(live, counts, strict=True)]), strict=True
        ):
            rows[i].append(logits)
    for case, prompt_len, pieces in zip(cases, prompt_lens, rows, strict=True):
        logits = np.concatenate(pieces)
        check_prompt(logits[:prompt_len], case)
        if case["min_margin"] > TOLERANCE:
            assert logits[prompt_len - 1 : -1].argmax(axis=-1).tolist() == case["greedy_token_ids"]
