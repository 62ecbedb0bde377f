"""Attention over a paged key/value cache.

One function serves prefill, decode, chunks of prompts, cached prefixes and any mixture: a sequence's query tokens are
its last ones, and each sees the keys up to its own position.
"""

from __future__ import annotations

import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.device import Array
from cupy_engine.ops import _cuda_attention
from cupy_engine.ops._attention_reference import attend


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

    Example::

        mixed = paged_attention(q, k_cache, v_cache, batch.attention, head_dim**-0.5)
    """
    if not isinstance(q, np.ndarray):
        return _cuda_attention.paged_attention(q, k_cache, v_cache, metadata, scale, sliding_window, soft_cap, out)
    out = np.empty(q.shape, q.dtype) if out is None else out
    attend(q, k_cache, v_cache, metadata, np.float32(scale), sliding_window, soft_cap, out)
    return out
