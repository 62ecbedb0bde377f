"""Embedding lookup: rows of a table by id."""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops import _cuda_embedding


def embedding(token_ids: Array, table: Array, out: Array | None = None) -> Array:
    """Rows of ``table``; ids outside it are clamped, so that a bad id cannot read foreign memory.

    Args:
        token_ids: [T] integers (token ids, or positions for learned position embeddings).
        table: [V, H].
        out: [T, H]; allocated if absent.

    Returns:
        [T, H] in the table's dtype, ``out``.

    Example::

        hidden = embedding(batch.token_ids, table)
    """
    if not isinstance(table, np.ndarray):
        return _cuda_embedding.embedding(token_ids, table, out)
    rows: np.ndarray = np.take(table, token_ids, axis=0, out=out, mode="clip")
    return rows
