"""Draws follow the distribution they claim: chi-square over many positions of a few seeds."""

import math

import numpy as np
import pytest
import sampling_reference

from cupy_engine.device import NumpyDevice
from cupy_engine.plan import SlotSetup
from cupy_engine.sampler import Sampler
from cupy_engine.sampling_params import SamplingParams

NUM_DRAWS = 20_000
LOGITS = np.round(np.random.default_rng(11).standard_normal(24) * 1.5, 1).astype(np.float32)


def chi_square_limit(degrees, z=3.72):
    """The value that chi-square exceeds with probability 1e-4 (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def tokens_drawn(params, seeds=16):
    """Draws at NUM_DRAWS / seeds positions of each seed: counts by token."""
    sampler = Sampler(seeds, len(LOGITS), NumpyDevice())
    for slot in range(seeds):
        sampler.set_slot(SlotSetup(slot, params, 7 * slot, [1], 1, [0], [], False))
    counts = np.zeros(len(LOGITS), int)
    slots, rows = np.arange(seeds), np.zeros(seeds, int)
    for position in range(1, 1 + NUM_DRAWS // seeds):
        drawn = sampler.sample(LOGITS[None], rows, slots, np.full(seeds, position)).token_ids
        counts += np.bincount(drawn, minlength=len(LOGITS))
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings):
    params = SamplingParams(**settings)
    weights = sampling_reference.kept_weights(LOGITS.tolist(), params)
    total = sum(weights.values())
    expected = np.array([weights.get(token, 0.0) / total * NUM_DRAWS for token in range(len(LOGITS))])
    counts = tokens_drawn(params)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = (np.square(counts[kept] - expected[kept]) / expected[kept]).sum()
    assert statistic < chi_square_limit(kept.sum() - 1)
