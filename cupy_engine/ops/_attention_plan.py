"""How the NumPy backend cuts a step's attention into array operations: worked out once, used by every layer.

Sequences with one query token are decoded in groups of similar length: few array operations serve many sequences, and
little of them is padding. The others go one at a time, in pieces of queries, so that the scores of a long prompt do not
fill the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.ops._crew import crew

_MAX_GROUP_KEYS = 1 << 14  # keys gathered at a time
_MAX_PADDING = 0.25  # of a group's longest sequence
_MIN_SHARED_KEYS = 1 << 10  # keys of all decodes; below, one thread is faster than several
_MAX_PIECE_ROWS = 64  # queries times query heads per key head


@dataclass(slots=True)
class DecodeGroup:
    """n sequences with one query each, whose keys span at most m blocks."""

    rows: np.ndarray | slice  # [n] rows of q
    blocks: np.ndarray  # [n, m] block ids, padded with any valid id
    keys: slice  # which of the m * block_size gathered keys any sequence sees
    mask: np.ndarray | None  # [n, 1, 1, keys] float32, -inf on keys out of sight; None if all are seen
    unseen: tuple[np.ndarray, ...] | None  # index of those keys in [n, keys]


@dataclass(slots=True)
class QueryPiece:
    """Some consecutive queries of a sequence and the keys they see."""

    rows: slice  # of q
    keys: slice  # of the sequence's keys
    mask: np.ndarray  # [queries, c] float32 for the last c of those keys: -inf on those out of sight


@dataclass(slots=True)
class Prefill:
    """A sequence with several queries, in pieces that see ever fewer keys."""

    blocks: np.ndarray  # [m] block ids
    pieces: list[QueryPiece]


@dataclass(slots=True)
class AttentionPlan:
    """All of a step's attention."""

    decodes: list[DecodeGroup]
    prefills: list[Prefill]


def plan_attention(
    metadata: AttentionMetadata, block_size: int, group_size: int, sliding_window: int | None
) -> AttentionPlan:
    """Cut the attention of a step with ``group_size`` query heads to each key head."""
    query_lens, context_lens = metadata.host_query_lens, metadata.host_context_lens
    last_rows = np.cumsum(query_lens) - 1
    decodes = np.flatnonzero(query_lens == 1)
    spans = _KeySpans.of(context_lens[decodes], block_size, sliding_window)
    tables = metadata.block_tables
    piece_len = max(1, _MAX_PIECE_ROWS // group_size)
    groups = [
        _decode_group(last_rows[decodes[members]], tables[decodes[members]], spans.select(members), block_size)
        for members in _similar(spans.num_blocks, block_size)
    ]
    prefills = [
        _prefill(
            int(last_rows[s]) + 1,
            int(query_lens[s]),
            int(context_lens[s]),
            tables[s],
            block_size,
            piece_len,
            sliding_window,
        )
        for s in np.flatnonzero(query_lens > 1)
    ]
    return AttentionPlan(groups, prefills)


@dataclass(slots=True)
class _KeySpans:
    """Keys that decoding sequences see: positions ``first .. last`` (exclusive), in ``num_blocks`` blocks. All [n]."""

    first: np.ndarray
    last: np.ndarray
    first_block: np.ndarray
    num_blocks: np.ndarray

    @classmethod
    def of(cls, context_lens: np.ndarray, block_size: int, sliding_window: int | None) -> _KeySpans:
        first = np.maximum(context_lens - (sliding_window or context_lens), 0)
        first_block = first // block_size
        return cls(first, context_lens, first_block, -(-context_lens // block_size) - first_block)

    def select(self, members: np.ndarray) -> _KeySpans:
        return _KeySpans(self.first[members], self.last[members], self.first_block[members], self.num_blocks[members])


def _similar(num_blocks: np.ndarray, block_size: int) -> list[np.ndarray]:
    # Longest first; a group ends where its members become too short, or it has its share of the keys.
    order = np.argsort(-num_blocks, kind="stable")
    num_keys = int(num_blocks.sum()) * block_size
    num_threads = crew().num_threads if num_keys >= _MIN_SHARED_KEYS else 1
    max_keys = min(_MAX_GROUP_KEYS, -(-num_keys // num_threads))
    groups: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = int(num_blocks[order[start]])
        max_members = max(1, -(-max_keys // (longest * block_size)))
        candidates = order[start : start + max_members]
        end = start + int(np.count_nonzero(num_blocks[candidates] >= longest * (1 - _MAX_PADDING)))
        groups.append(order[start:end])
        start = end
    return groups


def _decode_group(row_ids: np.ndarray, tables: np.ndarray, spans: _KeySpans, block_size: int) -> DecodeGroup:
    num_blocks = int(spans.num_blocks.max())
    columns = np.minimum(spans.first_block[:, None] + np.arange(num_blocks), tables.shape[1] - 1)
    blocks = np.take_along_axis(tables, columns, axis=1)
    begin, end = spans.first - spans.first_block * block_size, spans.last - spans.first_block * block_size
    keys = slice(int(begin.min()), int(end.max()))
    rows = _as_slice(row_ids)
    positions = np.arange(keys.start, keys.stop)
    is_unseen = (positions < begin[:, None]) | (positions >= end[:, None])
    if not is_unseen.any():
        return DecodeGroup(rows, blocks, keys, None, None)
    mask = np.where(is_unseen, np.float32(-np.inf), np.float32(0))[:, None, None]
    return DecodeGroup(rows, blocks, keys, mask, np.nonzero(is_unseen))


def _as_slice(rows: np.ndarray) -> np.ndarray | slice:
    # Consecutive rows as a slice, which is faster to index with.
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (rows[1:] > rows[:-1]).all():
        return slice(first, last + 1)
    return rows


def _prefill(
    end_row: int,
    num_queries: int,
    context_len: int,
    table: np.ndarray,
    block_size: int,
    piece_len: int,
    sliding_window: int | None,
) -> Prefill:
    first_row, first_position = end_row - num_queries, context_len - num_queries
    pieces = [
        _piece(first_row, first_position, slice(start, min(start + piece_len, num_queries)), sliding_window)
        for start in range(0, num_queries, piece_len)
    ]
    return Prefill(table[: -(-context_len // block_size)], pieces[::-1])


def _piece(first_row: int, first_position: int, queries: slice, sliding_window: int | None) -> QueryPiece:
    positions = np.arange(first_position + queries.start, first_position + queries.stop)
    end = int(positions[-1]) + 1
    begin = 0 if sliding_window is None else max(0, int(positions[0]) + 1 - sliding_window)
    # Without a window only the keys of the piece itself can lie ahead of a query.
    masked = np.arange(int(positions[0]) if sliding_window is None else begin, end)
    distance = positions[:, None] - masked
    is_unseen = distance < 0
    if sliding_window is not None:
        is_unseen |= distance >= sliding_window
    mask = np.where(is_unseen, np.float32(-np.inf), np.float32(0))
    return QueryPiece(slice(first_row + queries.start, first_row + queries.stop), slice(begin, end), mask)
