"""Every kernel instantiation the engine launches: file in ``kernels/`` → names with template arguments."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

HALF_TYPES = ("bf16", "fp16")
TYPES = ("float", *HALF_TYPES)

NORM_ITEMS = {1: (4, 16), 4: (1, 2, 4, 8), 8: (1, 2, 4)}  # vector width → vectors a thread may hold
ACTIVATIONS = ("Silu", "QuickGelu", "Gelu", "GeluTanh", "Relu", "SquaredRelu")
GATED_ACTIVATIONS = ("Silu", "Gelu", "GeluTanh")


def vector_widths(type_name: str) -> tuple[int, int]:
    """Elements per memory access: one for odd shapes, else 16 bytes."""
    return (1, 4) if type_name in ("float", "float32") else (1, 8)


@dataclass(frozen=True)
class DecodeLayout:
    """struct Layout of ``attention_decode.cu``: ``8 * column_tiles`` query rows, ``stages`` tiles a warp."""

    column_tiles: int
    warps: int
    stages: int

    @property
    def columns(self) -> int:
        return 8 * self.column_tiles

    def expression(self, type_name: str, head_dim: int) -> str:
        return f"attention_decode<{type_name}, {head_dim}, {self.column_tiles}, {self.warps}, {self.stages}>"

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: the warps' outputs, then 16 rows of K and of V per stage and warp."""
        chunks = head_dim // 8
        row_bytes = 16 * (chunks if chunks % 8 == 0 else chunks | 1)
        return self.warps * (self.columns * (head_dim + 4) * 4 + self.stages * 2 * 16 * row_bytes)


@dataclass(frozen=True)
class PrefillLayout:
    """struct Layout of ``attention_prefill.cu``: ``16 * row_tiles`` query rows a warp, ``keys`` keys a step."""

    row_tiles: int
    warps: int
    keys: int

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps

    def expression(self, type_name: str, head_dim: int) -> str:
        return f"attention_prefill<{type_name}, {head_dim}, {self.row_tiles}, {self.warps}, {self.keys}>"

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: the rows of Q, K and V."""
        return (self.rows + 2 * self.keys) * 16 * (head_dim // 8 | 1)


# (head_dim, more than 8 query rows per key/value head) → layouts, the first that fits the GPU's shared memory is taken
DECODE_LAYOUTS: dict[tuple[int, bool], tuple[DecodeLayout, ...]] = {
    (64, False): (DecodeLayout(1, 4, 4),),
    (64, True): (DecodeLayout(2, 4, 3),),
    (80, False): (DecodeLayout(1, 4, 3),),
    (80, True): (DecodeLayout(2, 4, 2),),
    (96, False): (DecodeLayout(1, 4, 2),),
    (96, True): (DecodeLayout(2, 4, 2),),
    (128, False): (DecodeLayout(1, 4, 2),),
    (128, True): (DecodeLayout(2, 4, 2),),
    (256, False): (DecodeLayout(1, 2, 2),),
    (256, True): (DecodeLayout(1, 2, 2),),
}
SM90_PREFILL_KEYS = {64: 128, 128: 128, 256: 64}  # head_dim → keys a step
SM90_PREFILL_ROWS, SM90_PREFILL_BLOCK = 128, 384
PREFILL_LAYOUTS = {
    64: PrefillLayout(2, 4, 64),
    80: PrefillLayout(2, 4, 64),
    96: PrefillLayout(2, 4, 64),
    128: PrefillLayout(2, 4, 64),
    256: PrefillLayout(1, 4, 32),
}
GEMV_WARPS, GEMV_UNROLL = 4, 4
GEMV_ROWS_PER_WARP = {1: 1, 2: 1, 3: 2, 4: 2}  # rows of x → rows of weight
PLAIN_ITEMS = (2, 4, 8)  # elements of a row per lane

_TYPE_WIDTHS = [(t, width) for t in TYPES for width in vector_widths(t)]
_BOOLS = ("false", "true")


def sm90_prefill_expression(type_name: str, head_dim: int) -> str:
    return f"attention_prefill_sm90<{type_name}, {head_dim}, {SM90_PREFILL_KEYS[head_dim]}, true>"


def sm90_prefill_shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory: the rows of Q, two stages of K and of V, and room to begin at a multiple of 1024 bytes."""
    return (SM90_PREFILL_ROWS + 4 * SM90_PREFILL_KEYS[head_dim]) * head_dim * 2 + 1024


GATED_SM90_BLOCK = 384
GATED_SM90_SHARED_BYTES = 4 * (128 + 2 * 128) * 128 + 128 * 128 * 2 + 1024  # SHARED_BYTES of ``gemm_gated_sm90.cu``

SKINNY_SM90_BLOCK = 288
SKINNY_SM90_TOKENS = (8, 16, 32, 64, 128)  # rows of x that a kernel makes room for


def skinny_sm90_expression(type_name: str, out_type: str, tokens: int, functor: str) -> str:
    return f"gemm_skinny_sm90<{type_name}, {out_type}, {tokens}, {functor}>"


def skinny_sm90_shared_bytes(tokens: int) -> int:
    """Dynamic shared memory: as many stages of weights and x as fit, and room to begin at a multiple of 1024 bytes."""
    stage_bytes = (128 + tokens) * 128
    return (112 << 10) // stage_bytes * stage_bytes + 1024


INSTANTIATIONS: dict[str, tuple[str, ...]] = {
    "norm.cu": tuple(
        f"norm<{t}, {width}, {items}, {add}, {center}>"
        for t, width in _TYPE_WIDTHS
        for items, add, center in product(NORM_ITEMS[width], _BOOLS, _BOOLS)
    ),
    "activation.cu": (
        *(f"activate_and_mul<{t}, {width}, {f}>" for t, width in _TYPE_WIDTHS for f in GATED_ACTIVATIONS),
        *(f"activate<{t}, {width}, {f}>" for t, width in _TYPE_WIDTHS for f in ACTIVATIONS),
    ),
    "embedding.cu": tuple(
        f"embedding<{t}, {width}, {index}>" for t, width in _TYPE_WIDTHS for index in ("int", "int64")
    ),
    "kv_cache.cu": (*(f"write_kv<{t}, {width}>" for t, width in _TYPE_WIDTHS), "copy_blocks"),
    "attention_plain.cu": tuple(f"attention_plain<{t}, {items}>" for t in TYPES for items in PLAIN_ITEMS),
    "attention_decode.cu": tuple(
        dict.fromkeys(
            layout.expression(t, head_dim)
            for t in HALF_TYPES
            for (head_dim, _), layouts in DECODE_LAYOUTS.items()
            for layout in layouts
        )
    ),
    "attention_prefill.cu": tuple(
        layout.expression(t, head_dim) for t in HALF_TYPES for head_dim, layout in PREFILL_LAYOUTS.items()
    ),
    "last_tokens.cu": ("take_last_tokens",),
    "sampling.cu": (
        "seat_slots",
        "set_masks",
        *(f"{kernel}<{t}, {width}>" for kernel in ("best_tokens", "draw_tokens") for t, width in _TYPE_WIDTHS),
    ),
    "logprobs.cu": tuple(f"token_logprobs<{t}, {width}>" for t, width in _TYPE_WIDTHS),
    "attention_prefill_sm90.cu": tuple(
        sm90_prefill_expression(t, head_dim) for t in HALF_TYPES for head_dim in SM90_PREFILL_KEYS
    ),
    "gemv.cu": tuple(
        f"gemv<{t}, {m}, {rows}, {GEMV_UNROLL}, {out}>"
        for t in TYPES
        for m, rows in GEMV_ROWS_PER_WARP.items()
        for out in dict.fromkeys((t, "float"))
    ),
    "gemm_gated_sm90.cu": tuple(f"gemm_gated_sm90<{t}, {f}>" for t in HALF_TYPES for f in GATED_ACTIVATIONS),
    "gemm_skinny_sm90.cu": tuple(
        skinny_sm90_expression(t, out, tokens, f)
        for t in HALF_TYPES
        for tokens in SKINNY_SM90_TOKENS
        for out, f in ((t, "Plain"), ("float", "Plain"), *((t, f) for f in GATED_ACTIVATIONS))
    ),
    "rope.cu": tuple(f"rope_and_write_kv<{t}, {width}>" for t, width in _TYPE_WIDTHS),
}

# Files that need one architecture's own instructions; all others are for every architecture.
_SM90_FILES = ("attention_prefill_sm90.cu", "gemm_gated_sm90.cu", "gemm_skinny_sm90.cu")
ARCHITECTURES_OF = dict.fromkeys(_SM90_FILES, ("sm_90a",))

# Spilled registers cost memory traffic: a few bytes are harmless, and the prefill kernel of head size 128 keeps some
# addresses in local memory, read once per 64 keys.
DEFAULT_SPILL_BUDGET_BYTES = 16
SPILL_BUDGET_BYTES = {"attention_prefill.cu": 256}
