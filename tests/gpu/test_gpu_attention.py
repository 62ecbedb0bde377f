"""Attention kernels against the reference: ragged lengths, shuffled blocks, poisoned memory behind the last key."""

from __future__ import annotations

import numpy as np
import pytest
from attention_problem import Problem
from gpu_arrays import DTYPES, poisoned, random, relative_error, to_gpu

from cupy_engine.ops.attention import paged_attention

pytestmark = pytest.mark.gpu

# Weights and outputs are rounded to the type; the sums between are float32.
TOLERANCE = {"float32": 5e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}


DECODE_LENGTHS = [1, 16, 17, 63, 64, 65, 200, 331]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 36])
def test_decode(rng: np.random.Generator, head_dim: int, dtype: str) -> None:
    lengths = DECODE_LENGTHS
    problem = Problem(rng, dtype, [1] * len(lengths), lengths, (8, 2), head_dim)
    assert problem.error() < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (12, 1), (32, 2), (25, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_decode_groups(rng: np.random.Generator, head_dim: int, heads: tuple[int, int]) -> None:
    problem = Problem(rng, "bfloat16", [1, 1, 1], [70, 5, 129], heads, head_dim)
    assert problem.error() < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("window", [1, 16, 50, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_sliding_window(rng: np.random.Generator, dtype: str, window: int) -> None:
    lengths = DECODE_LENGTHS
    problem = Problem(rng, dtype, [1] * len(lengths), lengths, (4, 2), 64)
    assert problem.error(sliding_window=window) < TOLERANCE[dtype]


@pytest.mark.parametrize("context_len", [5003, 33001])
def test_decode_of_one_long_sequence(rng: np.random.Generator, context_len: int) -> None:
    problem = Problem(rng, "bfloat16", [1], [context_len], (8, 2), 128)
    assert problem.error() < TOLERANCE["bfloat16"]


def test_decode_of_many_sequences(rng: np.random.Generator) -> None:
    lengths = rng.integers(1, 80, 300).tolist()
    problem = Problem(rng, "float16", [1] * len(lengths), lengths, (2, 1), 64)
    assert problem.error() < TOLERANCE["float16"]


def test_query_tokens_without_keys_give_zeros(rng: np.random.Generator) -> None:
    problem = Problem(rng, "bfloat16", [1, 1, 1], [40, 70, 9], (4, 2), 64)
    metadata = problem.metadata(to_gpu)
    metadata.context_lens[1:2] = 0
    out = poisoned(problem.q.shape, problem.q.dtype)
    arrays = [to_gpu(a) for a in (problem.q, problem.k_cache, problem.v_cache)]
    paged_attention(*arrays, metadata, problem.scale, out=out)
    result = out.get().astype(np.float32)
    assert np.isfinite(result).all()
    assert not result[1].any()
    assert result[[0, 2]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 36])
def test_prefill(rng: np.random.Generator, head_dim: int, dtype: str) -> None:
    problem = Problem(rng, dtype, [130, 33, 64], [130, 33, 64], (4, 2), head_dim)
    assert problem.error() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batch_with_cached_prefixes(rng: np.random.Generator, dtype: str) -> None:
    query_lens, context_lens = [1, 40, 1, 7, 100, 2, 1, 17], [77, 140, 1, 200, 100, 2, 33, 17]
    problem = Problem(rng, dtype, query_lens, context_lens, (8, 2), 64)
    assert problem.error() < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 20, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_sliding_window(rng: np.random.Generator, dtype: str, window: int) -> None:
    problem = Problem(rng, dtype, [90, 20, 1, 150], [90, 130, 140, 150], (4, 2), 64)
    assert problem.error(sliding_window=window) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(rng: np.random.Generator, dtype: str) -> None:
    problem = Problem(rng, dtype, [30, 1, 3], [50, 60, 40], (4, 2), 64)
    problem.q *= problem.q.dtype.type(8)
    assert problem.error(soft_cap=5.0) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 32, 48])
def test_block_sizes(rng: np.random.Generator, dtype: str, block_size: int) -> None:
    problem = Problem(rng, dtype, [30, 1, 64], [100, 97, 64], (4, 2), 64, block_size)
    assert problem.error() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_inside_a_fused_projection(rng: np.random.Generator, dtype: str) -> None:
    problem = Problem(rng, dtype, [1, 40], [50, 40], (4, 2), 64)
    fused = random(rng, (41, 8, 64), DTYPES[dtype])
    fused[:, :4] = problem.q
    out = poisoned(problem.q.shape, problem.q.dtype)
    caches = [to_gpu(a) for a in (problem.k_cache, problem.v_cache)]
    paged_attention(to_gpu(fused)[:, :4], *caches, problem.metadata(to_gpu), problem.scale, out=out)
    host = (problem.q.astype(np.float32), problem.k_cache, problem.v_cache)
    assert relative_error(out, paged_attention(*host, problem.metadata(np.asarray), problem.scale)) < TOLERANCE[dtype]


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    problem = Problem(rng, "float16", [1, 40], [50, 40], (4, 2), 64)
    problem.q *= np.float16(200)
    problem.k_cache *= np.float16(200)
    assert problem.error() < TOLERANCE["float16"]
