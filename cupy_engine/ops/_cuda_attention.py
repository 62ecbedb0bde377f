"""CUDA launches of attention: which kernel serves which sequences, and the memory they share.

query tokens x group <= 16, or one query token   attention_decode.cu    split over the keys, whole GPU per launch
more                                             attention_prefill.cu   a block per 128 query rows
float32, unusual head sizes or block sizes       attention_plain.cu     everything
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.device import Array
from cupy_engine.ops import _compile
from cupy_engine.ops._instantiations import (
    DECODE_LAYOUTS,
    PLAIN_ITEMS,
    PREFILL_LAYOUTS,
    SM90_PREFILL_BLOCK,
    SM90_PREFILL_KEYS,
    SM90_PREFILL_ROWS,
    DecodeLayout,
    sm90_prefill_expression,
    sm90_prefill_shared_bytes,
)
from cupy_engine.ops._launch import address, check_contiguous, empty, is_hopper, launch, type_name, zeros

_MAX_DECODE_ROWS = 16  # query tokens x heads of a group
_KEYS_PER_TILE = 16
_STATIC_SHARED_BYTES = 1024  # more than any decode kernel declares
_INT_MAX = (1 << 31) - 1

# struct AttentionInputs and struct Partials of kernels/common/
_POINTERS = ("out", "q", "k_cache", "v_cache", "query_start", "context_lens", "block_tables")  # four per layer first
_INTS = (
    *("num_seqs", "num_heads", "num_kv_heads", "head_dim", "num_blocks", "block_size", "table_width"),
    *("min_query_len", "max_query_len", "window"),
)
_INPUTS = np.dtype(
    [(name, "u8") for name in _POINTERS]
    + [("q_token_stride", "i8")]
    + [(name, "i4") for name in _INTS]
    + [("scale", "f4"), ("soft_cap", "f4")],
    align=True,
)
_PARTIALS = np.dtype([("out", "u8"), ("stats", "u8"), ("arrivals", "u8")])


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Array | None,
) -> Array:
    """Attention of q [T, Hq, D], whose tokens may lie any distance apart; see :func:`.attention.paged_attention`.

    Raises:
        ValueError: an array is not contiguous as said, or the head dimension is larger than 256.
    """
    out = empty(q.shape, q.dtype) if out is None else out
    check_contiguous(
        out=out,
        k_cache=k_cache,
        v_cache=v_cache,
        query_start=metadata.query_start,
        context_lens=metadata.context_lens,
        block_tables=metadata.block_tables,
    )
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return out
    if q.strides[1:] != (head_dim * q.itemsize, q.itemsize):
        raise ValueError(f"q must have contiguous tokens, got strides {q.strides}")
    inputs = _inputs(q, k_cache, v_cache, metadata, (scale, sliding_window, soft_cap), out)
    if not _suits_tensor_cores(q, k_cache, v_cache, out):
        _launch_plain(q, inputs)
        return out

    share = _share(metadata, num_heads // k_cache.shape[2])
    if share.num_decode_rows:
        _launch_decode(q, inputs, share)
    if share.has_prefills:
        _launch_prefill(q, inputs, share)
    return out


@dataclass(frozen=True, slots=True)
class _Share:
    """Which sequences of a step go to which kernel, and how many query rows (tokens x heads of a group) that makes."""

    max_decode_len: int  # query tokens of the sequences that the decode kernel serves
    num_decode_rows: int  # of the longest of them; 0 if there are none
    prefill_rows: np.ndarray  # of each of the other sequences
    num_more_tiles: int = 0  # for sequences that ``prefill_rows`` does not list

    @property
    def has_prefills(self) -> bool:
        return len(self.prefill_rows) > 0

    def num_prefill_tiles(self, rows_per_tile: int) -> int:
        return int((-(-self.prefill_rows // rows_per_tile)).sum()) + self.num_more_tiles


def _share(metadata: AttentionMetadata, group: int) -> _Share:
    """The same for all layers of a step."""
    key = ("share", group)
    if key not in metadata.host_plans:
        metadata.host_plans[key] = _find_share(metadata, group)
    share: _Share = metadata.host_plans[key]
    return share


def _find_share(metadata: AttentionMetadata, group: int) -> _Share:
    if (bounds := metadata.bounds) is not None:  # however the tokens are divided, there are no more tiles than this
        return _Share(1, group, np.array([bounds.num_tokens * group]), bounds.max_num_prefills)
    max_decode_len = max(1, _MAX_DECODE_ROWS // group)
    query_lens = metadata.host_query_lens
    longest_decode = int(query_lens[query_lens <= max_decode_len].max(initial=0))
    return _Share(max_decode_len, group * longest_decode, query_lens[query_lens > max_decode_len] * group)


def _inputs(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    metadata: AttentionMetadata,
    options: tuple[float, int | None, float | None],
    out: Array,
) -> np.ndarray:
    """struct AttentionInputs; the layers of a step share one, of which only the first four addresses change."""
    key = (q.shape, q.strides, k_cache.shape, options)
    known = metadata.host_plans.get(key)
    if known is None:
        inputs = _step_inputs(q, k_cache, metadata, options)
        known = metadata.host_plans[key] = inputs, inputs.view(np.uint64)[:4]
    inputs, addresses = known
    addresses[:] = out.data.ptr, q.data.ptr, k_cache.data.ptr, v_cache.data.ptr
    return inputs


def _step_inputs(
    q: Array, k_cache: Array, metadata: AttentionMetadata, options: tuple[float, int | None, float | None]
) -> np.ndarray:
    inputs = np.zeros(1, _INPUTS)
    for name in ("query_start", "context_lens", "block_tables"):
        inputs[name] = address(getattr(metadata, name))
    inputs["q_token_stride"] = q.strides[0] // q.itemsize
    inputs["num_seqs"] = len(metadata.context_lens)
    inputs["num_heads"], inputs["head_dim"] = q.shape[1:]
    inputs["num_blocks"], inputs["block_size"], inputs["num_kv_heads"] = k_cache.shape[:3]
    inputs["table_width"] = metadata.block_tables.shape[1]
    scale, sliding_window, soft_cap = options
    inputs["window"] = sliding_window or _INT_MAX
    inputs["scale"] = scale
    inputs["soft_cap"] = soft_cap or 0.0
    return inputs


def _suits_tensor_cores(q: Array, k_cache: Array, v_cache: Array, out: Array) -> bool:
    return (
        type_name(q) != "float"
        and q.shape[2] in PREFILL_LAYOUTS
        and k_cache.shape[1] % _KEYS_PER_TILE == 0
        and q.strides[0] % 16 == 0
        and all(address(array) % 16 == 0 for array in (q, k_cache, v_cache, out))
    )


def _launch_plain(q: Array, inputs: np.ndarray) -> None:
    num_tokens, num_heads, head_dim = q.shape
    items = next((items for items in PLAIN_ITEMS if head_dim <= 32 * items), None)
    if items is None:
        raise ValueError(f"head dimension {head_dim} is larger than {32 * PLAIN_ITEMS[-1]}")
    launch("attention_plain.cu", f"attention_plain<{type_name(q)}, {items}>", (num_tokens, num_heads), 256, inputs)


def _launch_prefill(q: Array, inputs: np.ndarray, share: _Share) -> None:
    head_dim = q.shape[2]
    inputs["min_query_len"], inputs["max_query_len"] = share.max_decode_len + 1, _INT_MAX
    num_kv_heads = int(inputs["num_kv_heads"][0])
    if head_dim in SM90_PREFILL_KEYS and is_hopper():
        expression = sm90_prefill_expression(type_name(q), head_dim)
        grid = (num_kv_heads, share.num_prefill_tiles(SM90_PREFILL_ROWS))
        shared_bytes = sm90_prefill_shared_bytes(head_dim)
        launch("attention_prefill_sm90.cu", expression, grid, SM90_PREFILL_BLOCK, inputs, shared_bytes=shared_bytes)
        return
    layout = PREFILL_LAYOUTS[head_dim]
    launch(
        "attention_prefill.cu",
        layout.expression(type_name(q), head_dim),
        (num_kv_heads, share.num_prefill_tiles(layout.rows)),
        32 * layout.warps,
        inputs,
        shared_bytes=layout.shared_bytes(head_dim),
    )


def _launch_decode(q: Array, inputs: np.ndarray, share: _Share) -> None:
    head_dim = q.shape[2]
    plan = _decode_plan(type_name(q), head_dim, share.num_decode_rows > 8)
    inputs["min_query_len"], inputs["max_query_len"] = 1, share.max_decode_len
    column_blocks = -(-share.num_decode_rows // plan.layout.columns)
    num_segments = int(inputs["num_seqs"][0]) * int(inputs["num_kv_heads"][0]) * column_blocks
    launch(
        "attention_decode.cu",
        plan.expression,
        (plan.grid,),
        32 * plan.layout.warps,
        inputs,
        _workspace().partials(2 * plan.grid * plan.layout.columns, head_dim, num_segments),
        column_blocks,
        shared_bytes=plan.shared_bytes,
    )


@dataclass(frozen=True)
class _DecodePlan:
    """A decode kernel and how many blocks of it the GPU holds at once."""

    layout: DecodeLayout
    expression: str
    shared_bytes: int
    grid: int


@functools.cache
def _decode_plan(type_: str, head_dim: int, has_many_columns: bool) -> _DecodePlan:
    import cupy

    attributes = cupy.cuda.Device().attributes
    shared_limit = attributes["MaxSharedMemoryPerBlockOptin"] - _STATIC_SHARED_BYTES
    layouts = DECODE_LAYOUTS[head_dim, has_many_columns]
    layout = next(layout for layout in layouts if layout.shared_bytes(head_dim) <= shared_limit)
    expression, shared_bytes = layout.expression(type_, head_dim), layout.shared_bytes(head_dim)
    kernel = _compile.kernel("attention_decode.cu", expression, shared_bytes)
    blocks_per_sm = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
        kernel.kernel.ptr, 32 * layout.warps, shared_bytes
    )
    return _DecodePlan(layout, expression, shared_bytes, blocks_per_sm * attributes["MultiProcessorCount"])


class _Workspace:
    """Memory in which blocks leave their parts of a segment for one another. One per stream: launches must not overlap.

    It grows on demand, and keeps what it had: a captured graph may hold its address.
    """

    def __init__(self) -> None:
        self._kept: list[Array] = []
        self._outs = self._stats = self._arrivals = empty((0,), np.float32)

    def partials(self, num_rows: int, head_dim: int, num_segments: int) -> np.ndarray:
        """struct Partials with room for ``num_rows`` rows of ``head_dim`` floats and ``num_segments`` counters."""
        if num_rows * head_dim > self._outs.size:
            self._outs = self._keep(empty((num_rows * head_dim,), np.float32))
        if num_rows * 2 > self._stats.size:
            self._stats = self._keep(empty((num_rows * 2,), np.float32))
        if num_segments > self._arrivals.size:
            self._arrivals = self._keep(zeros((max(num_segments, 1 << 14),), np.int32))
        return np.array([(address(self._outs), address(self._stats), address(self._arrivals))], _PARTIALS)

    def _keep(self, array: Array) -> Array:
        self._kept.append(array)
        return array


_workspaces: dict[tuple[int, int], _Workspace] = {}


def _workspace() -> _Workspace:
    import cupy

    key = (cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr)
    if key not in _workspaces:
        _workspaces[key] = _Workspace()
    return _workspaces[key]
