"""Token ids that are not known to the host yet, filled in where the step runs."""

from __future__ import annotations

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops._launch import launch


def take_last_tokens(token_ids: Array, last_tokens: Array) -> Array:
    """Replace each negative id, ``-1 - slot``, by the token last drawn in that slot.

    Args:
        token_ids: [T] int32, changed in place.
        last_tokens: [num_slots] int32.

    Returns:
        [T] int32, ``token_ids``.
    """
    if isinstance(token_ids, np.ndarray):
        unknown = np.flatnonzero(token_ids < 0)
        token_ids[unknown] = last_tokens[-1 - token_ids[unknown]]
    elif token_ids.size:
        grid = (-(-token_ids.size // 256),)
        arguments = (token_ids, last_tokens, token_ids.size, last_tokens.size)
        launch("last_tokens.cu", "take_last_tokens", grid, 256, *arguments)
    return token_ids
