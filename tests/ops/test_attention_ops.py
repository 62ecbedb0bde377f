"""Paged attention against one dot product at a time in float64; every slot that no sequence owns holds NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_engine.batch import AttentionMetadata
from cupy_engine.ops import _attention_plan, _attention_reference
from cupy_engine.ops.attention import paged_attention


@dataclass
class Case:
    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    metadata: AttentionMetadata
    scale: float


def make_case(
    query_lens: list[int],
    context_lens: list[int],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Case:
    """Random q, K and V over blocks in random physical order."""
    rng = np.random.default_rng(seed)
    blocks_needed = [-(-n // block_size) for n in context_lens]
    num_blocks = sum(blocks_needed) + 3
    free = rng.permutation(num_blocks).tolist()
    tables = np.full((len(context_lens), max(blocks_needed)), free.pop(), np.int32)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (np.full(shape, np.nan, np.float32).astype(dtype) for _ in "kv")
    for s, context_len in enumerate(context_lens):
        tables[s, : blocks_needed[s]] = [free.pop() for _ in range(blocks_needed[s])]
        for position in range(context_len):
            at = tables[s, position // block_size], position % block_size
            for cache in (k_cache, v_cache):
                cache[at] = rng.standard_normal((num_kv_heads, head_dim)).astype(dtype)
    ends = np.cumsum(query_lens)
    metadata = AttentionMetadata(
        query_start=np.concatenate([[0], ends]).astype(np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables=tables,
        slot_mapping=np.zeros(ends[-1], np.int32),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        host_query_lens=np.array(query_lens, np.int32),
        host_context_lens=np.array(context_lens, np.int32),
    )
    q = rng.standard_normal((int(ends[-1]), num_heads, head_dim)).astype(dtype)
    return Case(q, k_cache, v_cache, metadata, head_dim**-0.5)


def exact_attention(case: Case, sliding_window: int | None = None, soft_cap: float | None = None) -> np.ndarray:
    """Softmax over dot products, one query token and head at a time."""
    block_size, num_kv_heads = case.k_cache.shape[1:3]
    group = case.q.shape[1] // num_kv_heads
    out = np.empty(case.q.shape, np.float64)
    row = 0
    lens = zip(case.metadata.host_query_lens.tolist(), case.metadata.host_context_lens.tolist(), strict=True)
    for table, (query_len, context_len) in zip(case.metadata.block_tables, lens, strict=True):
        for position in range(context_len - query_len, context_len):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = np.arange(first, position + 1)
            at = table[seen // block_size], seen % block_size
            for head in range(case.q.shape[1]):
                keys, values = (c[at][:, head // group].astype(np.float64) for c in (case.k_cache, case.v_cache))
                scores = keys @ case.q[row, head].astype(np.float64) * case.scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ values / weights.sum()
            row += 1
    return out


def check(case: Case, sliding_window: int | None = None, soft_cap: float | None = None, atol: float = 2e-6) -> None:
    arguments = (case.q, case.k_cache, case.v_cache, case.metadata, case.scale)
    result = paged_attention(*arguments, sliding_window=sliding_window, soft_cap=soft_cap)
    assert result.dtype == case.q.dtype
    expected = exact_attention(case, sliding_window, soft_cap)
    np.testing.assert_allclose(result.astype(np.float64), expected, atol=atol, rtol=0)


MIXTURES = {
    "one decode": ([1], [37]),
    "first token": ([1], [1]),
    "equal decodes": ([1] * 5, [48] * 5),
    "ragged decodes": ([1] * 7, [1, 200, 16, 17, 33, 90, 160]),
    "prefill": ([70], [70]),
    "prefill after a cached prefix": ([21], [85]),
    "last chunk of one token": ([1], [65]),
    "mixed": ([1, 40, 1, 7, 1, 2], [31, 40, 130, 55, 1, 18]),
}


@pytest.mark.parametrize("sliding_window", [None, 1, 5, 24, 1000])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_and_windows(name: str, sliding_window: int | None) -> None:
    check(make_case(*MIXTURES[name]), sliding_window)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 8), (8, 1, 24), (12, 3, 64), (2, 2, 5)])
def test_head_layouts(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    case = make_case(*MIXTURES["mixed"], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check(case)


@pytest.mark.parametrize("sliding_window", [None, 12])
def test_soft_cap(sliding_window: int | None) -> None:
    check(make_case(*MIXTURES["mixed"]), sliding_window, soft_cap=0.7)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)])
def test_half_precision(dtype: Any, atol: float) -> None:
    check(make_case(*MIXTURES["mixed"], dtype=dtype), atol=atol)


def test_long_prompts_go_in_pieces_and_keys_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention_plan, "_MAX_PIECE_ROWS", 30)
    monkeypatch.setattr(_attention_reference, "MAX_TILE_WORK", 1)
    monkeypatch.setattr(_attention_reference, "_MAX_LONE_WORK", 1)
    case = make_case([133, 1], [150, 40])
    check(case)
    assert len(case.metadata.host_plans[None].prefills[0].pieces) == 14
    check(make_case([133, 1], [150, 40]), sliding_window=31)


def test_many_decodes_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention_plan, "_MIN_SHARED_KEYS", 1)
    lens = [100] * 8 + [20, 300]
    case = make_case([1] * 10, lens)
    check(case)
    groups = case.metadata.host_plans[None].decodes
    assert len(groups) > 2
    assert sorted(row for group in groups for row in np.arange(10)[group.rows]) == list(range(10))


def test_scattered_rows_of_q_and_given_out() -> None:
    case = make_case([1, 3], [9, 20])
    wide = np.full((4, 10, 16), np.nan, np.float32)
    wide[:, :6] = case.q
    out = np.full(case.q.shape, np.nan, np.float32)
    arguments = (wide[:, :6], case.k_cache, case.v_cache, case.metadata, case.scale)
    assert paged_attention(*arguments, out=out) is out
    np.testing.assert_allclose(out, exact_attention(case), atol=2e-6)


def test_huge_scores_do_not_overflow() -> None:
    case = make_case([4], [30])
    case.scale = 1e4
    result = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, case.scale)
    assert np.isfinite(result).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 70)), min_size=1, max_size=6),
    st.sampled_from([1, 4, 16]),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(0, 1000),
)
def test_random_batches(lens: list[tuple[int, int]], block_size: int, window: int | None, seed: int) -> None:
    query_lens = [n for n, _ in lens]
    context_lens = [n + cached for n, cached in lens]
    case = make_case(
        query_lens, context_lens, num_heads=2, num_kv_heads=1, head_dim=4, block_size=block_size, seed=seed
    )
    check(case, window)


def test_no_query_sees_more_than_its_past() -> None:
    case = make_case([20], [20])
    before = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, case.scale)
    table = case.metadata.block_tables[0]
    case.v_cache[table[1], 2:] += 100.0  # positions 18 and 19
    after = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, case.scale)
    assert np.array_equal(before[:18], after[:18])
    assert not math.isclose(before[18, 0, 0], after[18, 0, 0], abs_tol=1.0)
