"""Attention over a paged key/value cache.

One function serves prefill, decode, chunks of prompts, cached prefixes and any mixture: a sequence's query tokens are
its last ones, and each sees the keys up to its own position.
"""

from __future__ import annotations

import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.device import Array

_MAX_SCORES = 1 << 22  # float32 scores held at a time; longer prompts go through in pieces of queries


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    metadata: AttentionMetadata,
    scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out: Array | None = None,
) -> Array:
    """Causal softmax attention (arXiv:1706.03762) with keys and values found through block tables (arXiv:2309.06180).

    Query head h reads key/value head ``h // (Hq / Hkv)``: multi-head, grouped-query and multi-query attention.

    Args:
        q: [T, Hq, D], the query tokens of all sequences back to back.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], holding this step's keys and values already.
        metadata: which rows belong to which sequence, its length and its blocks.
        scale: factor on the scores, usually ``D ** -0.5``.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; ``None`` for all.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)`` (Gemma 2); ``None`` for none.
        out: [T, Hq, D]; allocated if absent.

    Returns:
        [T, Hq, D] in the dtype of ``q``, ``out``.
    """
    out = np.empty(q.shape, q.dtype) if out is None else out
    block_size = k_cache.shape[1]
    start = 0
    for s, (query_len, context_len) in enumerate(
        zip(metadata.host_query_lens.tolist(), metadata.host_context_lens.tolist(), strict=True)
    ):
        blocks = metadata.block_tables[s, : -(-context_len // block_size)]
        keys, values = (
            cache[blocks].reshape(-1, *cache.shape[2:])[:context_len].astype(np.float32, copy=False)
            for cache in (k_cache, v_cache)
        )
        rows = slice(start, start + query_len)
        out[rows] = _attend(q[rows], keys, values, np.float32(scale), sliding_window, soft_cap)
        start += query_len
    return out


def _attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: np.float32,
    sliding_window: int | None,
    soft_cap: float | None,
) -> np.ndarray:
    # q [t, Hq, D] at the end of keys, values [S, Hkv, D]
    num_queries, num_heads, head_dim = q.shape
    context_len, num_kv_heads = keys.shape[:2]
    group = num_heads // num_kv_heads
    out = np.empty(q.shape, np.float32)
    piece = max(1, _MAX_SCORES // (num_heads * context_len))
    for first in range(0, num_queries, piece):
        last = min(first + piece, num_queries)
        grouped = q[first:last].astype(np.float32).reshape(last - first, num_kv_heads, group, head_dim)
        grouped = grouped.transpose(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
        scores = (grouped * scale) @ keys.transpose(1, 2, 0)
        if soft_cap is not None:
            scores = np.float32(soft_cap) * np.tanh(scores / np.float32(soft_cap))
        scores = scores.reshape(num_kv_heads, group, last - first, context_len)
        position = np.arange(first, last)[:, None] + (context_len - num_queries)
        distance = position - np.arange(context_len)
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        scores[:, :, hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = scores.reshape(num_kv_heads, -1, context_len) @ values.transpose(1, 0, 2)
        mixed = mixed.reshape(num_kv_heads, group, last - first, head_dim).transpose(2, 0, 1, 3)
        out[first:last] = mixed.reshape(last - first, num_heads, head_dim)
    return out
