"""Rotary embedding: the table of every scaling type against its formula, the rotation against complex numbers."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_engine.errors import ConfigError
from cupy_engine.model_config import RopeConfig
from cupy_engine.ops.rope import apply_rope, rope_and_write_kv, rope_table

HEAD_DIM = 32
POSITIONS = 200


def frequency(i: int, theta: float = 10000.0, dim: int = HEAD_DIM) -> float:
    return theta ** (-2 * i / dim)


def table_of(frequencies: list[float], magnitude: float = 1.0) -> np.ndarray:
    angles = np.outer(np.arange(POSITIONS), frequencies)
    return magnitude * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def check_table(rope: RopeConfig, expected: np.ndarray, trained_positions: int | None = None) -> None:
    table = rope_table(rope, HEAD_DIM, POSITIONS, trained_positions)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, atol=2e-5, rtol=0)


def test_default() -> None:
    check_table(RopeConfig(theta=500.0), table_of([frequency(i, 500.0) for i in range(HEAD_DIM // 2)]))


def test_rotary_dim_below_head_dim() -> None:
    check_table(RopeConfig(rotary_dim=8), table_of([frequency(i, dim=8) for i in range(4)]))


def test_linear() -> None:
    rope = RopeConfig(rope_type="linear", scaling={"factor": 4.0})
    check_table(rope, table_of([frequency(i) / 4 for i in range(HEAD_DIM // 2)]))


@pytest.mark.parametrize("trained_positions", [50, 200, 400])
def test_dynamic_stretches_the_base_beyond_the_trained_length(trained_positions: int) -> None:
    rope = RopeConfig(rope_type="dynamic", scaling={"factor": 2.0})
    ratio = max(POSITIONS, trained_positions) / trained_positions
    theta = 10000.0 * (2.0 * ratio - 1.0) ** (HEAD_DIM / (HEAD_DIM - 2))
    check_table(rope, table_of([frequency(i, theta) for i in range(HEAD_DIM // 2)]), trained_positions)


def test_llama3() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }

    def stretched(f: float) -> float:
        wavelength = 2 * math.pi / f
        if wavelength < 64 / 4.0:
            return f
        if wavelength > 64 / 1.0:
            return f / 8.0
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * f / 8.0 + smooth * f

    frequencies = [stretched(frequency(i)) for i in range(HEAD_DIM // 2)]
    assert len({f / frequency(i) for i, f in enumerate(frequencies)}) > 2, "all three ranges are covered"
    check_table(RopeConfig(rope_type="llama3", scaling=scaling), table_of(frequencies))


@pytest.mark.parametrize(
    ("extra", "magnitude"),
    [
        ({}, 0.1 * math.log(4.0) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(4.0) + 1) / (0.1 * math.log(4.0) + 1)),
    ],
)
def test_yarn(extra: dict[str, float], magnitude: float) -> None:
    def pair(turns: float) -> float:
        return HEAD_DIM * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(pair(32.0)), 0), min(math.ceil(pair(1.0)), HEAD_DIM - 1)
    frequencies = []
    for i in range(HEAD_DIM // 2):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        frequencies.append(frequency(i) * (1 - ramp) + frequency(i) / 4.0 * ramp)
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64, **extra}
    check_table(RopeConfig(rope_type="yarn", scaling=scaling), table_of(frequencies, magnitude))


def test_unknown_type_and_missing_factor_are_refused() -> None:
    with pytest.raises(ConfigError, match="'longrope' is unknown"):
        rope_table(RopeConfig(rope_type="longrope"), HEAD_DIM, 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'linear' needs a 'factor'"):
        rope_table(RopeConfig(rope_type="linear"), HEAD_DIM, 8)


def rotated(x: np.ndarray, positions: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Dimension pairs (i, i + R/2) as complex numbers, turned by multiplication."""
    half = table.shape[2]
    wide = x.astype(np.float64)
    turn = (table[:, 0].astype(np.float64) + 1j * table[:, 1])[positions][:, None]
    turned = (wide[..., :half] + 1j * wide[..., half : 2 * half]) * turn
    return np.concatenate([turned.real, turned.imag, wide[..., 2 * half :]], axis=-1)


TOLERANCE: dict[Any, float] = {np.float32: 1e-6, np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 8])
@pytest.mark.parametrize(("num_tokens", "num_heads", "num_kv_heads"), [(1, 9, 3), (13, 4, 4), (5, 6, 1)])
def test_rotation(num_tokens: int, num_heads: int, num_kv_heads: int, rotary_dim: int, dtype: Any) -> None:
    rng = np.random.default_rng(num_tokens)
    table = rope_table(RopeConfig(rotary_dim=rotary_dim), HEAD_DIM, POSITIONS)
    positions = rng.integers(0, POSITIONS, num_tokens).astype(np.int32)
    q, k, v = (
        rng.standard_normal((num_tokens, heads, HEAD_DIM)).astype(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    expected_q, expected_k = rotated(q, positions, table), rotated(k, positions, table)
    atol = TOLERANCE[dtype] * 4

    qkv = np.concatenate([q, k, v], axis=1).reshape(num_tokens, -1)
    for layout in (qkv.copy(), np.asfortranarray(qkv)):
        k_cache, v_cache = (np.full((3, 16, num_kv_heads, HEAD_DIM), np.nan, np.float32).astype(dtype) for _ in "kv")
        slots = rng.permutation(48)[:num_tokens].astype(np.int32)
        result = rope_and_write_kv(layout, positions, table, k_cache, v_cache, slots)
        np.testing.assert_allclose(result.astype(np.float64), expected_q, atol=atol, rtol=0)
        stored = k_cache.reshape(48, num_kv_heads, HEAD_DIM)[slots]
        np.testing.assert_allclose(stored.astype(np.float64), expected_k, atol=atol, rtol=0)
        assert np.array_equal(v_cache.reshape(48, num_kv_heads, HEAD_DIM)[slots], v)
        assert np.isnan(k_cache.astype(np.float32)).sum() == (48 - num_tokens) * num_kv_heads * HEAD_DIM

    apply_rope(q, k, positions, table)
    np.testing.assert_allclose(q.astype(np.float64), expected_q, atol=atol, rtol=0)
    np.testing.assert_allclose(k.astype(np.float64), expected_k, atol=atol, rtol=0)


def test_without_a_table_only_the_cache_is_written() -> None:
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((4, 3 * 2 * 8), dtype=np.float32)
    k_cache, v_cache = (np.zeros((1, 16, 2, 8), np.float32) for _ in "kv")
    q = rope_and_write_kv(qkv.copy(), np.arange(4), None, k_cache, v_cache, np.arange(4))
    np.testing.assert_array_equal(q, qkv.reshape(4, 6, 8)[:, :2])
    np.testing.assert_array_equal(k_cache[0, :4], qkv.reshape(4, 6, 8)[:, 2:4])
    np.testing.assert_array_equal(v_cache[0, :4], qkv.reshape(4, 6, 8)[:, 4:])
