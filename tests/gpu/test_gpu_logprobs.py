"""Log-probabilities on the GPU against the NumPy sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_arrays import DTYPES, to_gpu
from sampler_pair import SamplerPair, random_logits, setup

from cupy_engine.cuda_sampler import logprob_records
from cupy_engine.messages import TokenLogprobs

pytestmark = pytest.mark.gpu


def assert_close(records: list[Any], expected: list[TokenLogprobs | None], largest_logit: float = 40.0) -> None:
    """The same tokens and ranks; values within the reference's rounding, that of its float32 logits."""
    tolerance = 1e-7 * largest_logit
    assert len(records) == len(expected)
    for record, reference in zip(records, expected, strict=True):
        if record is None or reference is None:
            assert record is reference
            continue
        assert (record.token_id, record.rank) == (reference.token_id, reference.rank)
        assert [token for token, _ in record.top] == [token for token, _ in reference.top]
        values = [record.logprob, *(value for _, value in record.top)]
        assert values == pytest.approx(
            [reference.logprob, *(value for _, value in reference.top)], rel=3e-7, abs=tolerance, nan_ok=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 49152, 128256])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_prompt_logprobs_match_the_reference(
    rng: np.random.Generator, vocab_size: int, num_top: int, dtype: str
) -> None:
    pair = SamplerPair(1, vocab_size)
    logits = random_logits(rng, 9, vocab_size, DTYPES[dtype])
    token_ids = rng.integers(0, vocab_size, 9).astype(np.int32)
    with pair.device.use():
        records = pair.gpu.prompt_logprobs(to_gpu(logits), token_ids, num_top)
    assert_close(records, pair.reference.prompt_logprobs(logits.astype(np.float32), token_ids, num_top))


def test_the_most_likely_may_be_hopeless(rng: np.random.Generator) -> None:
    """Far below the best, and forbidden tokens among them."""
    logits = np.full((2, 3000), -np.inf, np.float32)
    logits[:, rng.permutation(3000)[:12]] = rng.standard_normal(12) * 100
    logits[1] = rng.standard_normal(3000)
    logits[1, 9] = 400.0
    pair = SamplerPair(1, 3000)
    with pair.device.use():
        records = pair.gpu.prompt_logprobs(to_gpu(logits), np.array([2, 5], np.int32), 20)
    assert_close(records, pair.reference.prompt_logprobs(logits, np.array([2, 5]), 20), 500.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_rows_are_nan_and_leave_the_others_alone(rng: np.random.Generator, value: float) -> None:
    logits = rng.standard_normal((3, 1000)).astype(np.float32)
    logits[1, 3] = value
    if value == -np.inf:
        logits[1] = value
    pair = SamplerPair(1, 1000)
    token_ids = np.array([1, 2, 3], np.int32)
    with pair.device.use():
        records = pair.gpu.prompt_logprobs(to_gpu(logits), token_ids, 3)
    assert_close(records, pair.reference.prompt_logprobs(logits, token_ids, 3))


def test_draws_get_what_their_requests_asked_for(rng: np.random.Generator) -> None:
    """None, 0, 3 and 20 alternatives in one batch, and a draw that failed."""
    pair = SamplerPair(5, 1000)
    pair.seat(*(setup(slot, [1], temperature=0.0, logprobs=count) for slot, count in enumerate((None, 0, 3, 20, 2))))
    logits = rng.standard_normal((5, 1000)).astype(np.float32)
    logits[4, 8] = np.nan
    slots = np.arange(5)
    rows, token_ids = np.arange(5, dtype=np.int32), pair.draw(logits, range(5), slots, [1] * 5)
    with pair.device.use():
        outputs = [to_gpu(array) for array in (np.full((5, 21), -5, np.int32), np.ones((5, 21), np.float32))]
        ranks = to_gpu(np.full(5, -5, np.int32))
        pair.gpu.logprobs(to_gpu(logits), to_gpu(rows), to_gpu(token_ids), 20, *outputs, ranks)
        host = [array.get() for array in (*outputs, ranks)]
    records = logprob_records(pair.gpu.num_top_logprobs(slots), *host)
    assert_close(records, pair.reference.sample(logits, rows, slots, np.full(5, 1)).logprobs)
    assert records[4] is None
    assert np.isnan(host[1][4]).all()
    assert host[2][4] == 0
