"""The GPU kernels beside their limits: GB/s beside a device copy, TFLOP/s beside a large cuBLASLt product.

    python -m cupy_engine.bench.kernels [--only decode prefill] [--no-hopper] [--json]

Every case runs over several sets of inputs, together larger than the L2 cache, as one captured graph; the time is the
median over replays between two events.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
from cupy_engine.server.cli import main

from cupy_engine.batch import AttentionMetadata
from cupy_engine.cuda_device import why_no_cuda
from cupy_engine.device import Array
from cupy_engine.errors import ConfigError
from cupy_engine.ops import _cuda_attention, _gemm
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._gemm_tuning import fastest
from cupy_engine.ops.activation import silu_and_mul
from cupy_engine.ops.attention import paged_attention
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.kv_cache import copy_blocks
from cupy_engine.ops.norm import add_rms_norm, rms_norm
from cupy_engine.ops.rope import rope_and_write_kv

from .sampling_kernels import sampling_calls

BFLOAT16: Any = ml_dtypes.bfloat16
BLOCK_SIZE = 16
_NUM_WARM_UPS, _NUM_REPLAYS = 5, 20
_ROTATED_BYTES = 256 << 20
_MAX_SETS = 1024
_DEVICE_TO_DEVICE = 3  # cudaMemcpyKind

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One measured case; ``rate`` and ``limit`` are in ``unit``."""

    name: str
    case: str
    time_us: float
    rate: float
    limit: float
    unit: str


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


def time_s(launches: list[Launch]) -> float:
    """Median seconds per launch."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for launch in launches:
            launch()
        stream.synchronize()
        stream.begin_capture()
        for launch in launches:
            launch()
        graph = stream.end_capture()
        for _ in range(_NUM_WARM_UPS):
            graph.launch(stream)
        marks = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(_NUM_REPLAYS)]
        for begin, end in marks:
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
        stream.synchronize()
    times_ms = [float(cupy.cuda.get_elapsed_time(begin, end)) for begin, end in marks]
    return statistics.median(times_ms) / 1e3 / len(launches)


def copy_limit() -> float:
    """GB/s of a device-to-device copy, read and written bytes: the driver's or a kernel's, whichever is faster."""
    import cupy

    target, source = (random(1, 1, 1 << 16, BLOCK_SIZE, 4, 128) for _ in range(2))
    pairs = cupy.asarray(np.repeat(np.arange(1 << 16, dtype=np.int32), 2).reshape(-1, 2))
    seconds = [time_s([partial(copy_blocks, source, target, pairs)])]
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    for _ in range(_NUM_REPLAYS):
        begin.record()
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, _DEVICE_TO_DEVICE, 0)
        end.record()
        end.synchronize()
        seconds.append(float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3)
    return 2 * int(source.nbytes) / min(seconds) / 1e9


def product_limit() -> float:
    """TFLOP/s of cuBLASLt, bfloat16, 8192 x 8192 x 8192."""
    x, weight, out = (random(8192, 8192) for _ in range(3))
    best = fastest(_product_shape(x, weight, out), [weight])
    return 2 * 8192**3 / time_s([partial(best.run, x, weight, None, out)]) / 1e12


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
    """The products of Llama-3-8B's layers: the best of cuBLASLt, and gemv.cu for a few rows."""
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        weights = [random(n, k) for _ in sets_for(2 * n * k)]
        for m in (1, 2, 4, 16, 64, 256, 2048):
            x, out = random(m, k), random(m, n)
            shape = _product_shape(x, weights[0], out)
            products = _gemm.candidates(shape)
            library = fastest(shape, weights, [product for product in products if product.name != "gemv"])
            for product in [library, *(product for product in products if product.name == "gemv")]:
                name = "gemv" if product.name == "gemv" else "cublaslt"
                launches: list[Launch] = [partial(product.run, x, weight, None, out) for weight in weights]
                num_bytes, num_flops = 2.0 * (n * k + m * k + m * n), 2.0 * m * n * k if m >= 512 else 0.0
                yield Case(name, f"{m} x {n} x {k}", launches, num_bytes, num_flops)


def _product_shape(x: Array, weight: Array, out: Array) -> Shape:
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
    "sampling": sampling_cases,
}


def measure(families: list[str]) -> Iterator[Result]:
    """Measure the limits, then every case of the families."""
    limits = {"TFLOP/s": product_limit(), "GB/s": copy_limit()}  # the product first: it wakes the clocks
    for family in families:
        for case in FAMILIES[family]():
            seconds = time_s(case.launches)
            unit = "TFLOP/s" if case.num_flops else "GB/s"
            rate = case.num_flops / 1e12 if case.num_flops else case.num_bytes / 1e9
            yield Result(case.name, case.case, seconds * 1e6, rate / seconds, limits[unit], unit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench kernels``."""
    parser.add_argument(
        "--only", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES), help="families to measure"
    )
    parser.add_argument("--no-hopper", action="store_true", help="measure the kernels for GPUs before Hopper")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    reason = why_no_cuda()
    if reason is not None:
        raise ConfigError("device", f"kernels are measured on a GPU: {reason}")
    import cupy

    if arguments.no_hopper:
        _cuda_attention._is_hopper = lambda: False  # type: ignore[assignment]
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    header = {"gpu": gpu, "date": date.today().isoformat(), "cupy": cupy.__version__}
    results = measure(arguments.only)
    if arguments.json:
        print(json.dumps({**header, "results": [asdict(result) for result in results]}, indent=1))
        return 0
    print(", ".join(header.values()))
    for r in results:
        rate = f"{r.rate:8.0f} {r.unit:7} {r.rate / r.limit:6.1%} of {r.limit:.0f}"
        print(f"{r.name:18} {r.case:38} {r.time_us:10.1f} us {rate}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
