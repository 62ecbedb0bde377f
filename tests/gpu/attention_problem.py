"""Inputs of paged attention: ragged lengths, shuffled blocks, NaN in every slot that no key occupies."""

from __future__ import annotations

from typing import Any

import numpy as np
from gpu_arrays import DTYPES, poisoned, random, relative_error, to_gpu

from cupy_engine.batch import AttentionMetadata
from cupy_engine.ops.attention import paged_attention


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
