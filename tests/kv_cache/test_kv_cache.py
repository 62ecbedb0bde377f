"""The cache's arrays: sizes, block copies and swapping, padding rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cupy_engine.device import NumpyDevice
from cupy_engine.kv_cache import KVCache, blocks_that_fit, bytes_per_block
from cupy_engine.model_config import ModelConfig
from cupy_engine.ops.kv_cache import write_kv

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    norm_eps=1e-5,
    activation="silu",
    tie_word_embeddings=True,
)


@pytest.fixture
def cache() -> KVCache:
    """Six device and four host blocks of 8 tokens, every device value distinct."""
    cache = KVCache(CONFIG, 6, 8, 4, NumpyDevice(), np.float32)
    for layer in range(3):
        for which, array in enumerate(cache.layer(layer)):
            array[...] = np.arange(array.size, dtype=np.float32).reshape(array.shape) + 10_000 * (2 * layer + which)
    return cache


def snapshot(cache: KVCache) -> np.ndarray:
    """[layers, 2, blocks, block_size, heads, head_dim]."""
    return np.array([[array.copy() for array in cache.layer(i)] for i in range(3)])


def test_sizes(cache: KVCache) -> None:
    assert bytes_per_block(CONFIG, 8, np.float32) == 8 * 2 * 3 * 2 * 4 * 4
    assert bytes_per_block(CONFIG, 16, ml_dtypes.bfloat16) == 16 * 2 * 3 * 2 * 4 * 2
    assert cache.num_bytes == 6 * bytes_per_block(CONFIG, 8, np.float32)
    assert cache.layer(2)[1].shape == (6, 8, 2, 4)
    one = bytes_per_block(CONFIG, 8, np.float32)
    assert [blocks_that_fit(CONFIG, 8, np.float32, n) for n in (-5, 0, one - 1, one, 7 * one + 3)] == [0, 0, 0, 1, 7]


def test_a_new_cache_holds_no_nan() -> None:
    assert not snapshot(KVCache(CONFIG, 2, 8, 0, NumpyDevice(), np.float32)).any()


def test_copies_touch_nothing_but_their_destinations(cache: KVCache) -> None:
    before = snapshot(cache)
    cache.copy_blocks([(0, 3), (0, 5), (2, 1)])
    after = snapshot(cache)
    np.testing.assert_array_equal(after[:, :, [3, 5, 1]], before[:, :, [0, 0, 2]])
    np.testing.assert_array_equal(after[:, :, [0, 2, 4]], before[:, :, [0, 2, 4]])


def test_swapping_out_and_in_elsewhere_restores_the_blocks(cache: KVCache) -> None:
    before = snapshot(cache)
    cache.swap_out([(1, 3), (4, 0)])
    for layer in range(3):
        for array in cache.layer(layer):
            array[[1, 4]] = np.nan
    cache.swap_in([(0, 2), (3, 5)])
    after = snapshot(cache)
    np.testing.assert_array_equal(after[:, :, [2, 5]], before[:, :, [4, 1]])
    np.testing.assert_array_equal(after[:, :, [0, 3]], before[:, :, [0, 3]])
    assert np.isnan(after[:, :, [1, 4]]).all()


def test_no_pairs_is_no_change(cache: KVCache) -> None:
    before = snapshot(cache)
    cache.copy_blocks([])
    cache.swap_out([])
    cache.swap_in([])
    np.testing.assert_array_equal(snapshot(cache), before)


def test_padding_rows_are_not_stored() -> None:
    k, v = (np.full((3, 2, 4), value, np.float32) for value in (1, 2))
    k_cache, v_cache = (np.zeros((2, 8, 2, 4), np.float32) for _ in "kv")
    write_kv(k, v, k_cache, v_cache, np.array([9, -1, 0], np.int32))
    for value, cache in ((1, k_cache), (2, v_cache)):
        written = np.zeros((2, 8), bool)
        written[1, 1] = written[0, 0] = True
        np.testing.assert_array_equal(cache, np.where(written[..., None, None], value, 0) * np.ones((1, 1, 2, 4)))
