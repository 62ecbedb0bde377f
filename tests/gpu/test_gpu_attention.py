"""Attention kernels against the reference: ragged lengths, shuffled blocks, poisoned memory behind the last key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_arrays import DTYPES, poisoned, random, relative_error, to_gpu

from cupy_engine.batch import AttentionMetadata
from cupy_engine.ops.attention import paged_attention

pytestmark = pytest.mark.gpu

# Weights and outputs are rounded to the type; the sums between are float32.
TOLERANCE = {"float32": 5e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}


class Problem:
    """Queries and a paged cache of sequences with the given query and context lengths."""

    def __init__(
        self,
        rng: np.random.Generator,
        dtype: str,
        query_lens: list[int],
        context_lens: list[int],
        heads: tuple[int, int],
        head_dim: int,
        block_size: int = 16,
    ) -> None:
        num_heads, num_kv_heads = heads
        self.query_lens, self.context_lens = np.array(query_lens, np.int32), np.array(context_lens, np.int32)
        num_blocks_of = -(-self.context_lens // block_size)
        num_blocks, width = int(num_blocks_of.sum()) + 3, int(num_blocks_of.max()) + 2
        block_ids = rng.permutation(num_blocks)
        self.block_tables = np.full((len(query_lens), width), 1 << 30, np.int32)  # unused entries are garbage
        cache_shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = (random(rng, cache_shape, DTYPES[dtype]) for _ in range(2))
        is_used, taken = np.zeros((num_blocks, block_size), bool), 0
        for s, (count, length) in enumerate(zip(num_blocks_of.tolist(), context_lens, strict=True)):
            self.block_tables[s, :count] = block_ids[taken : taken + count]
            slots = np.arange(length)
            is_used[self.block_tables[s, slots // block_size], slots % block_size] = True
            taken += count
        self.k_cache[~is_used] = self.v_cache[~is_used] = np.nan
        self.q = random(rng, (int(self.query_lens.sum()), num_heads, head_dim), DTYPES[dtype])
        self.scale = head_dim**-0.5

    def metadata(self, convert: Any) -> AttentionMetadata:
        query_start = np.concatenate([[0], np.cumsum(self.query_lens)]).astype(np.int32)
        return AttentionMetadata(
            query_start=convert(query_start),
            context_lens=convert(self.context_lens),
            block_tables=convert(self.block_tables),
            slot_mapping=convert(np.zeros(len(self.q), np.int32)),
            max_query_len=int(self.query_lens.max()),
            max_context_len=int(self.context_lens.max()),
            host_query_lens=self.query_lens,
            host_context_lens=self.context_lens,
        )

    def error(self, **options: Any) -> float:
        """Relative error of the kernels against the reference."""
        out = poisoned(self.q.shape, self.q.dtype)
        arrays = [to_gpu(a) for a in (self.q, self.k_cache, self.v_cache)]
        paged_attention(*arrays, self.metadata(to_gpu), self.scale, out=out, **options)
        host = (self.q.astype(np.float32), self.k_cache, self.v_cache)
        return relative_error(out, paged_attention(*host, self.metadata(np.asarray), self.scale, **options))


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


def test_decode_of_one_long_sequence(rng: np.random.Generator) -> None:
    problem = Problem(rng, "bfloat16", [1], [5003], (8, 2), 128)
    assert problem.error() < TOLERANCE["bfloat16"]


def test_decode_of_many_sequences(rng: np.random.Generator) -> None:
    lengths = rng.integers(1, 80, 300).tolist()
    problem = Problem(rng, "float16", [1] * len(lengths), lengths, (2, 1), 64)
    assert problem.error() < TOLERANCE["float16"]


def test_padding_rows_of_a_graph_give_zeros(rng: np.random.Generator) -> None:
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
