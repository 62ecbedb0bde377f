"""The random numbers: Philox4x32-10, one uniform per (seed, position)."""

import numpy as np
import pytest
import sampling_reference

from cupy_engine.ops import sampling

# The known answers published with the generator (Random123, kat_vectors): counter, key → words.
KNOWN_ANSWERS = [
    ([0x00000000] * 4, [0x00000000] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words):
    got = sampling.philox4x32(np.array([counter], np.uint64).T, np.array([key], np.uint64).T)
    assert got[:, 0].tolist() == words
    assert sampling_reference.philox4x32_10(counter, key) == words


def test_uniforms_are_a_function_of_seed_and_position_alone():
    seeds = np.array([0, 1, 1, 2**64 - 1, 12345678901234567890], np.uint64)
    positions = np.array([0, 0, 1, 8191, 2**40])
    got = sampling.uniforms(seeds, positions)
    assert got.tolist() == [
        sampling_reference.uniform(int(seed), int(position)) for seed, position in zip(seeds, positions, strict=True)
    ]
    for one in range(5):
        assert sampling.uniforms(seeds[one : one + 1], positions[one : one + 1])[0] == got[one]


def test_uniforms_fill_the_unit_interval_evenly():
    """Along positions of one seed, along neighbouring seeds at one position, and between the two."""
    count = 1 << 16
    zeros = np.zeros(count, np.int64)
    along_positions = sampling.uniforms(zeros.astype(np.uint64), np.arange(count))
    along_seeds = sampling.uniforms(np.arange(count, dtype=np.uint64), zeros)
    for values in (along_positions, along_seeds):
        assert values.min() >= 0.0
        assert values.max() < 1.0
        cells = np.bincount((values * 64).astype(int), minlength=64)
        assert np.square(cells - count / 64).sum() / (count / 64) < 112.3  # chi-square, 63 degrees of freedom: p > 1e-4
    correlation = np.corrcoef([along_positions[:-1], along_positions[1:], along_seeds[1:]])
    assert np.abs(correlation - np.eye(3)).max() < 5 / np.sqrt(count)
