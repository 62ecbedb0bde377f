"""Paged attention in NumPy: gather a plan's keys and values, multiply, softmax, multiply."""

from __future__ import annotations

import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.ops._attention_plan import AttentionPlan, DecodeGroup, Prefill, QueryPiece, plan_attention
from cupy_engine.ops._crew import crew, even_cuts

_MIN_SHARED_SCORES = 1 << 18


def attend(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    metadata: AttentionMetadata,
    scale: np.float32,
    sliding_window: int | None,
    soft_cap: float | None,
    out: np.ndarray,
) -> None:
    """The reference of :func:`cupy_engine.ops.attention.paged_attention`; fills ``out``."""
    plan = metadata.host_plans.get(sliding_window)
    if plan is None:
        plan = plan_attention(metadata, k_cache.shape[1], q.shape[1], sliding_window)
        metadata.host_plans[sliding_window] = plan
    _PagedAttention(q, k_cache, v_cache, scale, soft_cap, out).run(plan)


class _PagedAttention:
    """One layer's arrays. Shapes: n sequences, t queries, s keys, Hkv key/value heads with G query heads each."""

    def __init__(
        self,
        q: np.ndarray,
        k_cache: np.ndarray,
        v_cache: np.ndarray,
        scale: np.float32,
        soft_cap: float | None,
        out: np.ndarray,
    ) -> None:
        self._q, self._k_cache, self._v_cache, self._out = q, k_cache, v_cache, out
        self._scale = scale
        self._soft_cap = None if soft_cap is None else np.float32(soft_cap)
        self._num_kv_heads, self._head_dim = k_cache.shape[2:]

    def run(self, plan: AttentionPlan) -> None:
        crew().run(self._decode, [(group,) for group in plan.decodes])
        for prefill in plan.prefills:
            self._prefill(prefill)

    def _decode(self, group: DecodeGroup) -> None:
        n = len(group.rows)
        q = np.multiply(self._q[group.rows], self._scale, dtype=np.float32, order="C")
        keys = self._gather(self._k_cache, group)
        scores = np.matmul(q.reshape(n, self._num_kv_heads, -1, self._head_dim), keys.transpose(0, 2, 3, 1))
        self._cap(scores)
        if group.mask is not None:
            scores += group.mask
        sums = _exponentiate(scores)
        values = self._gather(self._v_cache, group)
        mixed = np.matmul(scores, values.transpose(0, 2, 1, 3))  # [n, Hkv, G, D]
        mixed /= sums
        self._out[group.rows] = mixed.reshape(n, -1, self._head_dim)

    def _gather(self, cache: np.ndarray, group: DecodeGroup) -> np.ndarray:
        # [n, s, Hkv, D]. What nobody sees may be stale, even NaN, and 0 * NaN is not 0.
        gathered = _take_blocks(cache, group.blocks).reshape(len(group.rows), -1, *cache.shape[2:])[:, group.keys]
        if group.unseen is not None:
            gathered[group.unseen] = 0
        return gathered

    def _prefill(self, prefill: Prefill) -> None:
        keys, values = (
            _take_blocks(cache, prefill.blocks).reshape(-1, *cache.shape[2:])
            for cache in (self._k_cache, self._v_cache)
        )
        for piece in prefill.pieces:
            self._attend_piece(piece, keys[piece.keys], values[piece.keys])

    def _attend_piece(self, piece: QueryPiece, keys: np.ndarray, values: np.ndarray) -> None:
        num_queries, num_masked = piece.mask.shape
        q = np.multiply(self._q[piece.rows], self._scale, dtype=np.float32)
        q = q.reshape(num_queries, self._num_kv_heads, -1, self._head_dim).transpose(1, 2, 0, 3)  # [Hkv, G, t, D]
        group_size = q.shape[1]
        flat = q.reshape(self._num_kv_heads, group_size * num_queries, self._head_dim)
        scores = np.matmul(flat, keys.transpose(1, 2, 0))  # [Hkv, G * t, s]
        self._cap(scores)
        scores.reshape(*q.shape[:3], -1)[..., -num_masked:] += piece.mask
        sums = _exponentiate_shared(scores)
        mixed = np.matmul(scores, values.transpose(1, 0, 2))
        mixed /= sums
        self._out[piece.rows] = mixed.reshape(q.shape).transpose(2, 0, 1, 3).reshape(num_queries, -1, self._head_dim)

    def _cap(self, scores: np.ndarray) -> None:
        if self._soft_cap is not None:
            scores /= self._soft_cap
            np.tanh(scores, out=scores)
            scores *= self._soft_cap


def _take_blocks(cache: np.ndarray, block_ids: np.ndarray) -> np.ndarray:
    blocks: np.ndarray = np.take(cache, block_ids, axis=0, mode="clip")
    return blocks.astype(np.float32, copy=False)


def _exponentiate(scores: np.ndarray) -> np.ndarray:
    # In place: exp(score - max) of each row [..., s]. Returns the rows' sums [..., 1], by which results are divided.
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    sums: np.ndarray = scores.sum(axis=-1, keepdims=True)
    return sums


def _exponentiate_shared(scores: np.ndarray) -> np.ndarray:
    if scores.size < _MIN_SHARED_SCORES:
        return _exponentiate(scores)
    rows = scores.reshape(-1, scores.shape[-1])
    sums = np.empty((len(rows), 1), np.float32)

    def exponentiate(part: slice) -> None:
        sums[part] = _exponentiate(rows[part])

    crew().run(exponentiate, [(part,) for part in even_cuts(len(rows), crew().num_threads)])
    return sums.reshape(*scores.shape[:-1], 1)
