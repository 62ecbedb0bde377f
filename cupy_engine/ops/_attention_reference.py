"""Paged attention in NumPy: gather a plan's keys and values, multiply, softmax, multiply.

Products are cut along the keys so that none is large enough for BLAS to use its own threads, which would get into the
way of the crew's.
"""

from __future__ import annotations

import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.ops._attention_plan import AttentionPlan, DecodeGroup, Prefill, QueryPiece, plan_attention
from cupy_engine.ops._crew import crew
from cupy_engine.ops._tiled_matmul import MAX_TILE_WORK

_MAX_LONE_WORK = 1 << 18  # multiply-adds up to which OpenBLAS stays in the calling thread, whatever the kernel


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
        plan = plan_attention(metadata, k_cache.shape[1], q.shape[1] // k_cache.shape[2], sliding_window)
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
        self._group_size = q.shape[1] // self._num_kv_heads

    def run(self, plan: AttentionPlan) -> None:
        crew().run(self._decode, [(group,) for group in plan.decodes])
        for prefill in plan.prefills:
            self._prefill(prefill)

    def _decode(self, group: DecodeGroup) -> None:
        n = len(group.blocks)
        q = self._q[group.rows] * self._scale
        q = q.reshape(n, self._num_kv_heads, self._group_size, self._head_dim)
        keys = self._gather(self._k_cache, group).transpose(0, 2, 3, 1)  # [n, Hkv, D, s]
        parts = self._cut(self._group_size, keys.shape[-1], _MAX_LONE_WORK)
        sums, scores = self._weigh(q, keys, group.mask, parts)
        values = self._gather(self._v_cache, group).transpose(0, 2, 1, 3)  # [n, Hkv, s, D]
        mixed = self._mix(scores, values, parts)
        mixed /= sums
        self._out[group.rows] = mixed.reshape(n, -1, self._head_dim)

    def _gather(self, cache: np.ndarray, group: DecodeGroup) -> np.ndarray:
        # [n, s, Hkv, D]. What nobody sees may be stale, even NaN, and 0 * NaN is not 0.
        gathered = _take_blocks(cache, group.blocks)
        gathered = gathered.reshape(len(group.blocks), -1, *cache.shape[2:])[:, group.keys]
        if group.unseen is not None:
            gathered[group.unseen] = 0
        return gathered

    def _prefill(self, prefill: Prefill) -> None:
        keys, values = (
            _take_blocks(cache, prefill.blocks).reshape(-1, *cache.shape[2:])
            for cache in (self._k_cache, self._v_cache)
        )
        keys, values = np.ascontiguousarray(keys.transpose(1, 2, 0)), values.transpose(1, 0, 2)
        parts = [(piece, keys[..., piece.keys], values[:, piece.keys]) for piece in prefill.pieces]
        crew().run(self._attend_piece, parts)

    def _attend_piece(self, piece: QueryPiece, keys: np.ndarray, values: np.ndarray) -> None:
        # keys [Hkv, D, s], values [Hkv, s, D]
        q = self._q[piece.rows] * self._scale
        grouped = q.reshape(len(q), self._num_kv_heads, self._group_size, self._head_dim).transpose(1, 0, 2, 3)
        rows = grouped.reshape(self._num_kv_heads, -1, self._head_dim)  # [Hkv, t * G, D]
        mask = np.repeat(piece.mask, self._group_size, axis=0)
        parts = self._cut(rows.shape[1], keys.shape[-1], MAX_TILE_WORK)
        sums, scores = self._weigh(rows, keys, mask, parts)
        mixed = self._mix(scores, values, parts)
        mixed /= sums
        self._out[piece.rows] = mixed.reshape(grouped.shape).transpose(1, 0, 2, 3).reshape(q.shape)

    def _weigh(
        self, q: np.ndarray, keys: np.ndarray, mask: np.ndarray | None, parts: list[slice]
    ) -> tuple[np.ndarray, np.ndarray]:
        # q [..., r, D] @ keys [..., D, s] → exp(score - max) [..., r, s] and its sums [..., r, 1].
        # The mask is for the last of the keys.
        scores = np.empty((*q.shape[:-1], keys.shape[-1]), np.float32)
        for part in parts:
            np.matmul(q, keys[..., part], out=scores[..., part])
        if self._soft_cap is not None:
            scores /= self._soft_cap
            np.tanh(scores, out=scores)
            scores *= self._soft_cap
        if mask is not None:
            scores[..., -mask.shape[-1] :] += mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        return scores.sum(axis=-1, keepdims=True), scores

    def _mix(self, scores: np.ndarray, values: np.ndarray, parts: list[slice]) -> np.ndarray:
        # [..., r, s] @ [..., s, D] → [..., r, D]
        first, *others = parts
        mixed: np.ndarray = np.matmul(scores[..., first], values[..., first, :])
        for part in others:
            mixed += np.matmul(scores[..., part], values[..., part, :])
        return mixed

    def _cut(self, num_rows: int, num_keys: int, max_work: int) -> list[slice]:
        # Parts of the keys, each with at most so many multiply-adds for these rows of queries
        step = max(16, max_work // (num_rows * self._head_dim) // 16 * 16)
        return [slice(start, min(start + step, num_keys)) for start in range(0, num_keys, step)]


def _take_blocks(cache: np.ndarray, block_ids: np.ndarray) -> np.ndarray:
    blocks: np.ndarray = cache.take(block_ids, 0, None, "clip")
    return blocks.astype(np.float32, copy=False)
