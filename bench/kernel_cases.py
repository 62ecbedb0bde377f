"""What bench/kernels.py measures: the kernels at sizes of real models, on several sets of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from cupy_engine.batch import AttentionMetadata
from cupy_engine.device import Array
from cupy_engine.ops import _gemm
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._gated_gemm import FusedProduct, can_fuse
from cupy_engine.ops._gemm_tuning import fastest
from cupy_engine.ops._skinny_gemm import skinny_products
from cupy_engine.ops.activation import silu_and_mul
from cupy_engine.ops.attention import paged_attention
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.kv_cache import copy_blocks
from cupy_engine.ops.norm import add_rms_norm, rms_norm
from cupy_engine.ops.rope import rope_and_write_kv

from .sampling_kernels import sampling_calls

BFLOAT16: Any = ml_dtypes.bfloat16
BLOCK_SIZE = 16
_ROTATED_BYTES = 256 << 20
_MAX_SETS = 1024

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """``launches`` do the same work on different arrays; each moves ``num_bytes`` or computes ``num_flops``."""

    name: str
    case: str
    launches: list[Launch]
    num_bytes: float = 0.0
    num_flops: float = 0.0


def random(*shape: int, dtype: Any = BFLOAT16) -> Array:
    """Normally distributed values; not zeros, on which the GPU clocks higher."""
    import cupy

    flat, noise = cupy.empty(int(np.prod(shape)), dtype), _noise(dtype)
    for start in range(0, flat.size, noise.size):
        flat[start : start + noise.size] = noise[: flat.size - start]
    return flat.reshape(shape)


@cache
def _noise(dtype: Any) -> Array:
    import cupy

    return cupy.asarray(np.random.default_rng().standard_normal(1 << 22, dtype=np.float32).astype(dtype))


def sets_for(num_bytes: float) -> range:
    """How many sets of inputs of this size to rotate."""
    return range(int(min(_MAX_SETS, max(2, -(-_ROTATED_BYTES // num_bytes)))))


def elementwise_cases() -> Iterator[Case]:
    """Norms, activations, rotary embedding, lookups at Llama-3-8B's sizes."""
    import cupy

    hidden, inter, heads, kv_heads, head_dim = 4096, 14336, 32, 8, 128
    weight, table = random(hidden), random(128256, hidden)
    cosines = random(8192, 2, head_dim // 2, dtype=np.float32)
    caches = [random(8192 // BLOCK_SIZE, BLOCK_SIZE, kv_heads, head_dim) for _ in range(2)]
    for tokens in (16, 256, 8192):
        row, case = 2 * tokens, f"{tokens} x {hidden}"  # bytes of a column
        sets = [(random(tokens, hidden), random(tokens, hidden)) for _ in sets_for(4 * row * hidden)]
        yield Case("rms_norm", case, [partial(rms_norm, x, weight, 1e-5, y) for x, y in sets], 2 * row * hidden)
        launches: list[Launch] = [partial(add_rms_norm, x, y, weight, 1e-5, x) for x, y in sets]
        yield Case("add_rms_norm", case, launches, 4 * row * hidden)
        ids = [cupy.asarray(np.random.default_rng().integers(0, 128256, tokens).astype(np.int32)) for _ in sets]
        launches = [partial(embedding, i, table, y) for i, (_, y) in zip(ids, sets, strict=True)]
        yield Case("embedding", case, launches, 2 * row * hidden)
        gated = [(random(tokens, 2 * inter), random(tokens, inter)) for _ in sets_for(3 * row * inter)]
        launches = [partial(silu_and_mul, x, y) for x, y in gated]
        yield Case("silu_and_mul", f"{tokens} x {inter}", launches, 3 * row * inter)
        width = (heads + 2 * kv_heads) * head_dim
        slots = cupy.asarray(np.arange(tokens, dtype=np.int32))
        fused = [random(tokens, width) for _ in sets_for(2 * row * width)]
        launches = [partial(rope_and_write_kv, x, slots, cosines, caches[0], caches[1], slots) for x in fused]
        yield Case("rope_and_write_kv", f"{tokens} x {width}", launches, 2 * row * width)
    blocks = random(32, 2, 256, BLOCK_SIZE, kv_heads, head_dim)
    pairs = cupy.asarray(np.arange(256, dtype=np.int32).reshape(128, 2))
    moved = 2 * 128 * blocks[:, :, 0].nbytes
    yield Case("copy_blocks", "128 blocks of 32 layers", [partial(copy_blocks, blocks, blocks, pairs)], moved)


class Sequences:
    """A paged cache and queries for sequences of the given lengths, blocks in random order."""

    def __init__(self, query_lens: list[int], context_lens: list[int], heads: tuple[int, int], head_dim: int) -> None:
        import cupy

        blocks = [-(-length // BLOCK_SIZE) for length in context_lens]
        shape = (sum(blocks), BLOCK_SIZE, heads[1], head_dim)
        self.k_cache, self.v_cache = random(*shape), random(*shape)
        self.q, self.out = random(sum(query_lens), heads[0], head_dim), random(sum(query_lens), heads[0], head_dim)
        table = np.zeros((len(blocks), max(blocks)), np.int32)
        order = np.random.default_rng().permutation(sum(blocks)).astype(np.int32)
        for s, part in enumerate(np.split(order, np.cumsum(blocks)[:-1])):
            table[s, : len(part)] = part
        self.metadata = AttentionMetadata(
            query_start=cupy.asarray(np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)),
            context_lens=cupy.asarray(np.array(context_lens, np.int32)),
            block_tables=cupy.asarray(table),
            slot_mapping=cupy.asarray(np.zeros(sum(query_lens), np.int32)),
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
            host_query_lens=np.array(query_lens, np.int32),
            host_context_lens=np.array(context_lens, np.int32),
        )

    def attend(self) -> None:
        scale = self.q.shape[2] ** -0.5
        paged_attention(self.q, self.k_cache, self.v_cache, self.metadata, scale, out=self.out)


def decode_cases() -> Iterator[Case]:
    """One query token per sequence."""
    mixed = np.random.default_rng(0).integers(64, 8192, 64).tolist()
    for label, lens, heads, head_dim in (
        ("64 x 4096", [4096] * 64, (32, 8), 128),
        ("1 x 131072", [131072], (32, 8), 128),
        ("64 mixed, 64..8191", mixed, (32, 8), 128),
        ("256 x 192", [192] * 256, (32, 8), 128),
        ("32 x 192", [192] * 32, (32, 8), 128),
        ("1 x 192", [192], (32, 8), 128),
        ("64 x 2048", [2048] * 64, (32, 32), 128),
        ("64 x 4096", [4096] * 64, (32, 2), 128),
        ("64 x 4096", [4096] * 64, (16, 16), 64),
        ("64 x 4096", [4096] * 64, (16, 8), 256),
    ):
        num_bytes = 4.0 * sum(lens) * heads[1] * head_dim
        problems = [Sequences([1] * len(lens), lens, heads, head_dim) for _ in sets_for(num_bytes)]
        case = f"{label}, heads {heads[0]}/{heads[1]} x {head_dim}"
        yield Case("attention_decode", case, [p.attend for p in problems], num_bytes=num_bytes)


def prefill_cases() -> Iterator[Case]:
    """Whole prompts, causal, and a chunk behind a cached prefix."""
    for label, query_lens, context_lens, heads, head_dim in (
        ("1 x 8192", [8192], [8192], (32, 8), 128),
        ("4 x 2048", [2048] * 4, [2048] * 4, (32, 8), 128),
        ("16 x 512", [512] * 16, [512] * 16, (32, 8), 128),
        ("1 x 512", [512], [512], (32, 8), 128),
        ("512 after 7680", [512], [8192], (32, 8), 128),
        ("1 x 8192", [8192], [8192], (32, 8), 64),
        ("1 x 8192", [8192], [8192], (16, 8), 256),
    ):
        pairs = sum(q * c - q * (q - 1) / 2 for q, c in zip(query_lens, context_lens, strict=True))
        problem = Sequences(query_lens, context_lens, heads, head_dim)
        case = f"{label}, heads {heads[0]}/{heads[1]} x {head_dim}"
        yield Case("attention_prefill", case, [problem.attend] * 2, num_flops=4 * pairs * heads[0] * head_dim)


def product_cases() -> Iterator[Case]:
    """The products of Llama-3-8B's layers: the best of cuBLASLt, and our own kernels for few rows."""
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        weights = [random(n, k) for _ in sets_for(2 * n * k)]
        for m in (1, 2, 4, 16, 32, 64, 128, 256, 2048):
            x, out = random(m, k), random(m, n)
            shape = product_shape(x, weights[0], out)
            products = _gemm.candidates(shape)
            own = [product for product in products if product.name.startswith(("gemv", "skinny"))]
            library = fastest(shape, weights, [product for product in products if product not in own])
            for name, product in [("cublaslt", library), *((product.name, product) for product in own)]:
                launches: list[Launch] = [partial(product.run, x, weight, None, out) for weight in weights]
                num_bytes, num_flops = 2.0 * (n * k + m * k + m * n), 2.0 * m * n * k if m >= 512 else 0.0
                yield Case(name, f"{m} x {n} x {k}", launches, num_bytes, num_flops)


def gated_cases() -> Iterator[Case]:
    """Gates and ups of Llama-3-8B's MLP: cuBLASLt's best with and without the activation, and all in one kernel."""
    inter, k = 14336, 4096
    weights = [random(2 * inter, k) for _ in sets_for(4 * inter * k)]
    for m in (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        x, gate_up, out = random(m, k), random(m, 2 * inter), random(m, inter)
        shape = product_shape(x, weights[0], gate_up)
        library, fused = fastest(shape, weights), FusedProduct("Silu")
        runs: dict[str, list[Launch]] = {
            "cublaslt": [partial(library.run, x, weight, None, gate_up) for weight in weights],
            "cublaslt, silu_and_mul": [partial(_run_apart, library, x, weight, gate_up, out) for weight in weights],
            "gemm_gated": [partial(fused.run, x, weight, None, out) for weight in weights] if can_fuse(shape) else [],
        }
        for way in skinny_products(shape, "Silu"):
            runs[way.name] = [partial(way.run, x, weight, None, out) for weight in weights]
        for name, launches in runs.items():
            if launches:
                yield Case(name, f"{m} x 2 x {inter} x {k}", launches, num_flops=4.0 * m * inter * k)


def _run_apart(library: _gemm.Product, x: Array, weight: Array, gate_up: Array, out: Array) -> None:
    library.run(x, weight, None, gate_up)
    silu_and_mul(gate_up, out)


def product_shape(x: Array, weight: Array, out: Array) -> Shape:
    (m, k), n = x.shape, len(weight)
    return Shape(m, n, k, k, x.dtype.name, out.dtype.name, False)


def sampling_cases() -> Iterator[Case]:
    """Draws and log-probabilities; the bytes are those of the logits, read once."""
    for name, case, launches, num_bytes in sampling_calls():
        yield Case(name, case, launches, num_bytes)


FAMILIES = {
    "elementwise": elementwise_cases,
    "decode": decode_cases,
    "prefill": prefill_cases,
    "products": product_cases,
    "gated": gated_cases,
    "sampling": sampling_cases,
}
