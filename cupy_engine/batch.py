"""The packed arrays of one step, as models and ops see them.

tokens of all scheduled sequences, back to back:   [ seq 0 …… | seq 1 | seq 2 … ]      num_tokens = T
query_start                                          0          a       a+1     T      [S + 1]
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupy_engine.device import Array


@dataclass(frozen=True, slots=True)
class AttentionBounds:
    """What the steps that a captured graph serves have in common: most sequences compute one token, or none."""

    num_tokens: int  # of all sequences
    max_num_prefills: int  # sequences that may compute more than one


@dataclass(slots=True)
class AttentionMetadata:
    """Which keys each query token may see. S sequences, T query tokens.

    The query tokens of sequence s are rows ``query_start[s]:query_start[s+1]`` and stand at positions
    ``context_lens[s] - query_len .. context_lens[s] - 1``; its keys are positions ``0 .. context_lens[s] - 1``,
    found through row s of the block table.
    """

    query_start: Array  # [S + 1] int32
    context_lens: Array  # [S] int32, keys per sequence including this step's
    block_tables: Array  # [S, max_blocks] int32; only the first ceil(context_len / block_size) columns count
    slot_mapping: Array  # [T] int32, block_id * block_size + offset: where each token's K and V go
    max_query_len: int
    max_context_len: int
    host_query_lens: np.ndarray  # [S] int32 on the host
    host_context_lens: np.ndarray  # [S] int32 on the host
    host_plans: dict[Hashable, Any] = field(default_factory=dict)  # what attention prepared for all layers of the step
    bounds: AttentionBounds | None = None  # while a graph is captured, in place of lengths on the host


@dataclass(slots=True)
class Batch:
    """The input of one forward pass."""

    token_ids: Array  # [T] int32
    positions: Array  # [T] int32
    attention: AttentionMetadata
    output_rows: Array | None = None  # [R] int32, tokens whose hidden states are asked for; None: all, R = T
