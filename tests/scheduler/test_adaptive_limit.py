"""Where the limit on sequences rests, by what first tokens do."""

from __future__ import annotations

import random

import pytest

from cupy_engine.adaptive_limit import AdaptiveLimit


def test_it_takes_all_seats_while_first_tokens_are_in_time() -> None:
    limit = AdaptiveLimit(target_s=0.1)
    for _ in range(1000):
        limit.observe(0.1)
    assert [limit.max_sequences(most) for most in (1, 16, 256)] == [1, 16, 256]


def test_a_single_late_one_is_soon_forgotten() -> None:
    limit = AdaptiveLimit(target_s=0.1)
    limit.observe(0.2)
    assert limit.max_sequences(16) == 15
    for _ in range(100):
        limit.observe(0.05)
    assert limit.max_sequences(16) == 16


def test_it_rests_where_one_in_a_hundred_is_late() -> None:
    """Times grow with how many run; at 160 of 256, one in a hundred is late."""
    rng, limit, num_late, answers = random.Random(0), AdaptiveLimit(target_s=1.0), 0, []
    for number in range(60_000):
        ttft_s = limit.max_sequences(256) / 160 * rng.lognormvariate(0, 0.1) / 1.262  # its 99th percentile
        limit.observe(ttft_s)
        if number >= 1000:
            answers.append(limit.max_sequences(256))
            num_late += ttft_s > 1.0
    assert num_late / len(answers) == pytest.approx(0.01, rel=0.05)
    assert sum(answers) / len(answers) == pytest.approx(160, rel=0.05)


def test_it_gives_up_half_at_most_where_fewer_sequences_do_not_help() -> None:
    limit = AdaptiveLimit(target_s=0.1)
    for _ in range(1000):
        limit.observe(9.0)
    assert [limit.max_sequences(most) for most in (1, 2, 16)] == [1, 1, 8]
    for _ in range(1000):
        limit.observe(0.01)
    assert limit.max_sequences(16) == 16, "and takes it back"
