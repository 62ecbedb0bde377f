"""Activation, embedding, rotary and cache kernels against their references."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import DTYPES, ROUNDING, poisoned, random, relative_error, to_gpu

from cupy_engine.ops.activation import ACTIVATIONS, GATED_ACTIVATIONS
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.kv_cache import copy_blocks, write_kv
from cupy_engine.ops.rope import rope_and_write_kv

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1416), (3, 40), (7, 33), (129, 512)], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new"])
def test_gated_activations(rng: np.random.Generator, name: str, shape: tuple[int, int], dtype: str) -> None:
    gate_up = random(rng, (shape[0], 2 * shape[1]), DTYPES[dtype])
    out = poisoned(shape, DTYPES[dtype])
    GATED_ACTIVATIONS[name](to_gpu(gate_up), out=out)
    assert relative_error(out, GATED_ACTIVATIONS[name](gate_up.astype(np.float32))) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(rng: np.random.Generator, name: str, dtype: str) -> None:
    x = random(rng, (5, 77), DTYPES[dtype]) * DTYPES[dtype](3)
    result = ACTIVATIONS[name](to_gpu(x))
    assert relative_error(result, ACTIVATIONS[name](x.astype(np.float32))) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "quick_gelu"])
def test_activations_keep_their_limits(name: str) -> None:
    x = np.array([-3e38, -1e4, -90.0, 0.0, 90.0, 1e4], np.float32)
    assert np.allclose(ACTIVATIONS[name](to_gpu(x)).get(), np.maximum(x, 0.0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("hidden", [4096, 24, 37])
def test_embedding_clamps_ids(rng: np.random.Generator, hidden: int, index: type, dtype: str) -> None:
    table = random(rng, (50, hidden), DTYPES[dtype])
    ids = np.array([3, 2**31 - 1, -1, 49, 3], index)
    result = embedding(to_gpu(ids), to_gpu(table), out=poisoned((5, hidden), DTYPES[dtype]))
    assert np.array_equal(result.get(), np.take(table, ids, axis=0, mode="clip"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (80, 32), (20, 10)])
def test_rope_and_write_kv(rng: np.random.Generator, head_dim: int, rotary_dim: int, dtype: str) -> None:
    num_heads, num_kv_heads, num_tokens, num_blocks = 6, 2, 9, 5
    qkv = random(rng, (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), DTYPES[dtype])
    caches = [random(rng, (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim), DTYPES[dtype]) for _ in range(2)]
    slots = rng.permutation(num_blocks * BLOCK_SIZE)[:num_tokens].astype(np.int32)
    slots[3] = -1
    positions = rng.integers(0, 128, num_tokens).astype(np.int32)
    table = random(rng, (128, 2, rotary_dim // 2), np.float32)
    on_gpu = [to_gpu(array) for array in (qkv, positions, table, *caches, slots)]
    q = rope_and_write_kv(*on_gpu)
    reference = rope_and_write_kv(qkv, positions, table, *caches, slots)
    assert relative_error(q, reference) < ROUNDING[dtype]
    assert relative_error(on_gpu[3], caches[0]) < ROUNDING[dtype]
    assert np.array_equal(on_gpu[4].get(), caches[1])


def test_rope_reads_no_position_beyond_its_table(rng: np.random.Generator) -> None:
    qkv, table = random(rng, (2, 4 * 64), np.float32), random(rng, (8, 2, 32), np.float32)
    cache = np.zeros((1, BLOCK_SIZE, 1, 64), np.float32)
    positions, slots = np.array([1 << 30, -5], np.int32), np.array([1 << 30, -1], np.int32)
    on_gpu = [to_gpu(array) for array in (qkv, positions, table, cache, cache, slots)]
    q = rope_and_write_kv(*on_gpu)
    reference = rope_and_write_kv(qkv, positions, table, cache, cache, np.array([-1, -1], np.int32))
    assert relative_error(q, reference) < ROUNDING["float32"]
    assert not on_gpu[3].get().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("head_dim", [64, 20, 7])
def test_write_kv_takes_parts_of_a_fused_projection(
    rng: np.random.Generator, head_dim: int, has_table: bool, dtype: str
) -> None:
    qkv = random(rng, (5, 6 * head_dim), DTYPES[dtype])
    k_cache, v_cache = (random(rng, (2, BLOCK_SIZE, 2, head_dim), DTYPES[dtype]) for _ in range(2))
    slots = np.array([31, 0, -1, 7, 16], np.int32)
    k_gpu, v_gpu, heads = to_gpu(k_cache), to_gpu(v_cache), to_gpu(qkv).reshape(5, 6, head_dim)
    if has_table:
        write_kv(heads[:, 2:4], heads[:, 4:], k_gpu, v_gpu, to_gpu(slots))
    else:
        rope_and_write_kv(to_gpu(qkv), to_gpu(slots), None, k_gpu, v_gpu, to_gpu(slots))
    host_heads = qkv.reshape(5, 6, head_dim)
    write_kv(host_heads[:, 2:4], host_heads[:, 4:], k_cache, v_cache, slots)
    assert np.array_equal(k_gpu.get(), k_cache)
    assert np.array_equal(v_gpu.get(), v_cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks(rng: np.random.Generator, dtype: str) -> None:
    source = random(rng, (3, 2, 7, BLOCK_SIZE, 2, 24), DTYPES[dtype])
    destination = random(rng, (3, 2, 5, BLOCK_SIZE, 2, 24), DTYPES[dtype])
    pairs = np.array([[6, 0], [2, 4], [2, 1]], np.int32)
    on_gpu = to_gpu(destination)
    copy_blocks(to_gpu(source), on_gpu, pairs)
    copy_blocks(source, destination, pairs)
    assert np.array_equal(on_gpu.get(), destination)


def test_copy_blocks_to_the_host_and_back(rng: np.random.Generator) -> None:
    import cupy
    import cupyx

    on_gpu = to_gpu(random(rng, (2, 2, 6, BLOCK_SIZE, 2, 64), np.float16))
    before = on_gpu.get()
    host = cupyx.empty_pinned((2, 2, 3, BLOCK_SIZE, 2, 64), np.float16)
    copy_blocks(on_gpu, host, np.array([[5, 0], [1, 2]], np.int32))
    copy_blocks(host, on_gpu, np.array([[0, 3], [2, 4]], np.int32))
    cupy.cuda.Device().synchronize()
    assert np.array_equal(host[:, :, [0, 2]], before[:, :, [5, 1]])
    assert np.array_equal(on_gpu.get()[:, :, [3, 4]], before[:, :, [5, 1]])


def test_a_pageable_host_array_is_refused(rng: np.random.Generator) -> None:
    on_gpu = to_gpu(random(rng, (1, 2, 2, BLOCK_SIZE, 1, 64), np.float16))
    with pytest.raises(ValueError, match="page-locked"):
        copy_blocks(on_gpu, np.empty((1, 2, 2, BLOCK_SIZE, 1, 64), np.float16), np.array([[0, 1]], np.int32))
