"""CUDA launch of the embedding lookup: see ``kernels/embedding.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops._launch import check_contiguous, empty, launch, type_name, vector_width

_INDEX_TYPES: dict[str, tuple[str, Any]] = {"int32": ("int", np.int32), "int64": ("int64", np.int64)}


def embedding(token_ids: Array, table: Array, out: Array | None) -> Array:
    """Rows of table [V, H] by token_ids [T], int32 or int64, clamped. Returns ``out`` [T, H], allocated if absent.

    Raises:
        TypeError: ``token_ids`` has another dtype.
    """
    num_tokens, (vocab, hidden) = token_ids.size, table.shape
    out = empty((num_tokens, hidden), table.dtype) if out is None else out
    check_contiguous(token_ids=token_ids, table=table, out=out)
    if token_ids.dtype.name not in _INDEX_TYPES:
        raise TypeError(f"token_ids must be int32 or int64, got {token_ids.dtype}")
    if num_tokens:
        index, scalar = _INDEX_TYPES[token_ids.dtype.name]
        width = vector_width(hidden, table, out)
        block = min(256, -(-hidden // width // 32) * 32)
        expression = f"embedding<{type_name(table)}, {width}, {index}>"
        launch("embedding.cu", expression, (num_tokens,), block, out, table, token_ids, hidden, scalar(vocab))
    return out
