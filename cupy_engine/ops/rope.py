"""Rotary position embedding (RoFormer, arXiv:2104.09864), rotating the two halves of a head against each other.

dimension pair (i, i + R/2) at position p turns by the angle p * frequency[i],  0 <= i < R/2
"""

from __future__ import annotations

import math

import numpy as np

from cupy_engine.device import Array
from cupy_engine.errors import ConfigError
from cupy_engine.model_config import RopeConfig
from cupy_engine.ops import _cuda_kv_cache
from cupy_engine.ops.kv_cache import write_kv

_TURN = np.array([[-1], [1]], np.float32)  # the second half enters the first negatively


def rope_table(rope: RopeConfig, head_dim: int, max_positions: int, trained_positions: int | None = None) -> np.ndarray:
    """Cosines and sines of all positions.

    Args:
        rope: type, base and scaling parameters.
        head_dim: D; all of it rotates unless ``rope.rotary_dim`` says less.
        max_positions: P.
        trained_positions: the model's original context length, unless ``rope.scaling`` says
            ``original_max_position_embeddings``; default ``max_positions``.

    Returns:
        [P, 2, R/2] float32 on the host: cosines at ``[:, 0]``, sines at ``[:, 1]``, R the rotating dimensions.

    Raises:
        ConfigError: unknown type, or a scaling parameter is missing.
    """
    rotary_dim = rope.rotary_dim or head_dim
    trained_positions = rope.scaling.get("original_max_position_embeddings") or trained_positions or max_positions
    frequencies, magnitude = rope_frequencies(rope, rotary_dim, max_positions, trained_positions)
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.float32(magnitude)).astype(np.float32)


def apply_rope(q: Array, k: Array, positions: Array, table: Array) -> None:
    """Rotate queries and keys in place.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D].
        positions: [T] int32, all below P.
        table: [P, 2, R/2] float32 from :func:`rope_table`; dimensions from R on stay as they are.
    """
    rows = np.take(table, positions, axis=0, mode="clip")
    _rotate(q, rows)
    _rotate(k, rows)


def rope_and_write_kv(
    qkv: Array, positions: Array, table: Array | None, k_cache: Array, v_cache: Array, slot_mapping: Array
) -> Array:
    """Rotate the queries and keys of a fused projection and store keys and values in the cache.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D]: all query heads, then key heads, then value heads. May be overwritten.
        positions: [T] int32.
        table: [P, 2, R/2] float32 from :func:`rope_table`, or ``None`` for models without rotary embedding.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], written in place.
        slot_mapping: [T] int32; a negative slot marks a padding row that is not stored.

    Returns:
        [T, Hq, D], the rotated queries.
    """
    if not isinstance(qkv, np.ndarray):
        return _cuda_kv_cache.rope_and_write_kv(qkv, positions, table, k_cache, v_cache, slot_mapping)
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = np.ascontiguousarray(qkv).reshape(len(qkv), -1, head_dim)
    first_value = heads.shape[1] - num_kv_heads
    first_key = first_value - num_kv_heads
    if table is not None:
        _rotate(heads[:, :first_value], np.take(table, positions, axis=0, mode="clip"))
    write_kv(heads[:, first_key:first_value], heads[:, first_value:], k_cache, v_cache, slot_mapping)
    return heads[:, :first_key]


def _rotate(x: np.ndarray, rows: np.ndarray) -> None:
    # x [T, heads, D] in place by rows [T, 2, R/2] of the table
    half = rows.shape[-1]
    halves = x[..., : 2 * half].reshape(*x.shape[:-1], 2, half)
    straight = halves * rows[:, None, :1]
    crossed = halves[..., ::-1, :] * (rows[:, None, 1:] * _TURN)
    np.add(straight, crossed, out=halves, casting="unsafe")


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, max_positions: int, trained_positions: int
) -> tuple[np.ndarray, float]:
    """Angle per position of each dimension pair, [R/2] float64, and the factor on cosines and sines.

    Dynamic scaling takes ``max_positions`` for the sequence length: cached keys are never rotated again, so the base
    cannot change while a sequence grows.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    frequencies = rope.theta**-exponents
    match rope.rope_type:
        case "default":
            return frequencies, 1.0
        case "linear":
            return frequencies / _factor(rope), 1.0
        case "dynamic":
            stretch = _factor(rope) * max(max_positions, trained_positions) / trained_positions - (_factor(rope) - 1)
            return (rope.theta * stretch ** (rotary_dim / (rotary_dim - 2))) ** -exponents, 1.0
        case "llama3":
            return _llama3(rope, frequencies, trained_positions), 1.0
        case "yarn":
            return _yarn(rope, frequencies, rotary_dim, trained_positions)
        case unknown:
            raise ConfigError("rope_type", f"{unknown!r} is unknown; known are default, linear, dynamic, llama3, yarn")


def _factor(rope: RopeConfig) -> float:
    try:
        return float(rope.scaling["factor"])
    except KeyError:
        raise ConfigError("rope_scaling", f"type {rope.rope_type!r} needs a 'factor'") from None


def _llama3(rope: RopeConfig, frequencies: np.ndarray, trained_positions: int) -> np.ndarray:
    # Wavelengths longer than trained / low are stretched, shorter than trained / high kept, a ramp between.
    low = float(rope.scaling.get("low_freq_factor", 1.0))
    high = float(rope.scaling.get("high_freq_factor", 4.0))
    turns = trained_positions * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / _factor(rope))


def _yarn(
    rope: RopeConfig, frequencies: np.ndarray, rotary_dim: int, trained_positions: int
) -> tuple[np.ndarray, float]:
    # arXiv:2309.00071: pairs that turn more than beta_fast times over the trained context keep their frequency,
    # those below beta_slow are interpolated, a ramp over the pair index between.
    factor = _factor(rope)

    def pair_turning(turns: float) -> float:
        return rotary_dim * math.log(trained_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = pair_turning(float(rope.scaling.get("beta_fast") or 32.0))
    high = pair_turning(float(rope.scaling.get("beta_slow") or 1.0))
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 * (low == high)
    interpolated = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies * (1.0 - interpolated + interpolated / factor), _yarn_magnitude(rope, factor)


def _yarn_magnitude(rope: RopeConfig, factor: float) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    explicit = rope.scaling.get("attention_factor")
    if explicit is not None:
        return float(explicit)
    mscale, mscale_all_dim = rope.scaling.get("mscale"), rope.scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)
