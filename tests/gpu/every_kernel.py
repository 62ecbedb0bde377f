"""Launches every kernel once on small ragged inputs: what compute-sanitizer looks at in test_gpu_sanitizer.py.

    compute-sanitizer --tool racecheck python tests/gpu/every_kernel.py

Whether results are right is for the other tests to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from attention_problem import Problem
from gpu_arrays import DTYPES, poisoned, random, to_gpu
from sampler_pair import SamplerPair, random_logits, random_request, setup

from cupy_engine.ops import _compile, _cuda_attention, _gemm, activation
from cupy_engine.ops._cublaslt import Shape
from cupy_engine.ops._gated_gemm import FusedProduct
from cupy_engine.ops._instantiations import DECODE_LAYOUTS, INSTANTIATIONS, PREFILL_LAYOUTS
from cupy_engine.ops._launch import is_hopper
from cupy_engine.ops._skinny_gemm import SkinnyProduct
from cupy_engine.ops.attention import paged_attention
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.kv_cache import copy_blocks
from cupy_engine.ops.last_tokens import take_last_tokens
from cupy_engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from cupy_engine.ops.rope import rope_and_write_kv

TOKENS, VOCAB_SIZE = 5, 1003
rng = np.random.default_rng(0)


def elementwise(dtype: str) -> None:
    """Rows of odd length and of whole vectors."""
    for length in (40, 37, 4096):
        x, y = (to_gpu(random(rng, (TOKENS, length), DTYPES[dtype])) for _ in range(2))
        weight, bias = (to_gpu(random(rng, (length,), DTYPES[dtype])) for _ in range(2))
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, y, weight, 1e-5)
        layer_norm(x, weight, bias, 1e-5)
        add_layer_norm(x, y, weight, bias, 1e-5)
        activation.gelu(x)
        activation.silu_and_mul(to_gpu(random(rng, (TOKENS, 2 * length), DTYPES[dtype])))
        embedding(to_gpu(np.array([0, 3, TOKENS - 1], np.int32)), x)


def caches(dtype: str) -> None:
    """Writing keys and values with and without rotation, copying blocks, looking last tokens up."""
    k_cache, v_cache = (poisoned((4, 16, 2, 16), DTYPES[dtype]) for _ in range(2))
    positions = to_gpu(np.arange(TOKENS, dtype=np.int32))
    slots = to_gpu(np.array([5, -1, 63, 0, 17], np.int32))
    for table in (to_gpu(random(rng, (TOKENS, 2, 8), np.float32)), None):
        qkv = to_gpu(random(rng, (TOKENS, (4 + 2 * 2) * 16), DTYPES[dtype]))
        rope_and_write_kv(qkv, positions, table, k_cache, v_cache, slots)
    blocks = poisoned((2, 2, 4, 16, 2, 16), DTYPES[dtype])
    copy_blocks(blocks, blocks, to_gpu(np.array([[0, 3], [1, 2]], np.int32)))
    take_last_tokens(to_gpu(np.array([3, -1, -2], np.int32)), positions)


def attention(dtype: str) -> None:
    """Decode with few and many rows a key/value head, split keys, prefill with and without Hopper's instructions."""
    for head_dim, has_many_rows in DECODE_LAYOUTS:
        heads = (12, 1) if has_many_rows else (4, 2)
        attend(Problem(rng, dtype, [1] * 4, [1, 17, 200, 700], heads, head_dim))
    is_hopper = _cuda_attention.is_hopper
    for head_dim in PREFILL_LAYOUTS:
        for answer in (is_hopper, lambda: False):
            _cuda_attention.is_hopper = answer  # type: ignore[assignment, attr-defined]
            attend(Problem(rng, dtype, [40, 1, 70], [300, 33, 70], (4, 2), head_dim), sliding_window=150)
            attend(Problem(rng, dtype, [70], [70], (4, 2), head_dim), soft_cap=20.0)
    _cuda_attention.is_hopper = is_hopper
    attend(Problem(rng, dtype, [40, 1], [60, 33], (4, 2), 36))


def attend(problem: Problem, **options: Any) -> None:
    arrays = [to_gpu(a) for a in (problem.q, problem.k_cache, problem.v_cache)]
    paged_attention(*arrays, problem.metadata(to_gpu), problem.scale, **options)


def products(dtype: str) -> None:
    """The kernels for few rows, and for gates and ups of more tiles than run at once; the rest is the library's."""
    weight = to_gpu(random(rng, (72, 128), DTYPES[dtype]))
    name = np.dtype(DTYPES[dtype]).name
    for num_rows in (1, 2, 3, 4):
        x, out = to_gpu(random(rng, (num_rows, 128), DTYPES[dtype])), poisoned((num_rows, 72), DTYPES[dtype])
        shape = Shape(num_rows, 72, 128, 128, name, name, False)
        next(p for p in _gemm.candidates(shape) if p.name == "gemv").run(x, weight, None, out)
    if dtype != "float32" and is_hopper():
        for num_rows, inter, depth in ((5, 72, 40), (700, 3000, 136)):
            x, weight = (to_gpu(random(rng, shape, DTYPES[dtype])) for shape in ((num_rows, depth), (2 * inter, depth)))
            FusedProduct("Silu").run(x, weight, None, poisoned((num_rows, inter), DTYPES[dtype]))
        for num_rows, columns, depth, parts in ((3, 264, 72, 1), (40, 136, 1032, 4), (100, 1000, 2048, 8)):
            x, weight = (to_gpu(random(rng, (rows, depth), DTYPES[dtype])) for rows in (num_rows, 2 * columns))
            shape = Shape(num_rows, 2 * columns, depth, depth, name, name, False)
            SkinnyProduct(shape, parts).run(x, weight, None, poisoned((num_rows, 2 * columns), DTYPES[dtype]))
            SkinnyProduct(shape, parts, "Silu").run(x, weight, None, poisoned((num_rows, columns), DTYPES[dtype]))


def sampling(dtype: str) -> None:
    """Random requests of every kind, one of them with a mask, and their log-probabilities."""
    pair = SamplerPair(16, VOCAB_SIZE)
    pair.seat(*(setup(slot, **random_request(rng, VOCAB_SIZE)) for slot in range(15)), setup(15, [1], is_guided=True))
    pair.mask({15: rng.random(VOCAB_SIZE) < 0.5})
    logits, slots = random_logits(rng, 16, VOCAB_SIZE, DTYPES[dtype]), np.arange(16)
    for position in range(3):
        pair.draw(logits, slots, slots, np.full(16, position))
    with pair.device.use():
        ids, ranks = (cupy.empty(shape, np.int32) for shape in ((16, 6), (16,)))
        rows = to_gpu(slots.astype(np.int32))
        pair.gpu.logprobs(to_gpu(logits), rows, rows, 5, ids, cupy.empty((16, 6), np.float32), ranks)


def main() -> None:
    """Launch everything; fails if a file of kernels has been forgotten."""
    cupy.cuda.set_allocator(None)  # from the driver, so that the checker knows where an array ends
    launched, kernel = set(), _compile.kernel

    def note(file: str, *arguments: Any) -> Any:
        launched.add(file)
        return kernel(file, *arguments)

    _compile.kernel = note  # type: ignore[assignment]
    families: list[Callable[[str], None]] = [elementwise, caches, attention, products, sampling]
    for family in families:
        for dtype in ("bfloat16", "float32"):
            family(dtype)
            cupy.cuda.Device().synchronize()
            print(family.__name__, dtype, flush=True)
    forgotten = set(INSTANTIATIONS) - launched
    assert not forgotten, f"not launched: {forgotten}"


if __name__ == "__main__":
    main()
