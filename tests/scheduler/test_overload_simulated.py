"""What targets do to an engine that gets more than it can take, on simulated time."""

from __future__ import annotations

from statistics import fmean

import pytest
from cupy_engine.bench.loops import quantile
from simulated_engine import Served, SimulatedEngine, StepCosts

SECONDS = 12.0
WARM_UP_S = 3.0
CPU = StepCosts()
GPU = StepCosts(fixed_s=6e-3, per_sequence_s=0.02e-3, per_prompt_token_s=0.01e-3, spread=0.03, stall_share=0.0)


def settled(served: list[Served]) -> list[Served]:
    """Those who came when the engine knew itself."""
    return [each for each in served if each.arrival_s >= WARM_UP_S]


def rate_of(served: list[Served]) -> float:
    """Requests that end per second."""
    return sum(WARM_UP_S <= each.token_times_s[-1] < SECONDS for each in served) / (SECONDS - WARM_UP_S)


@pytest.mark.parametrize("slo_ttft_s", [0.1, 0.2])
def test_first_tokens_of_twice_the_load_come_in_time_and_no_seat_stays_empty(slo_ttft_s: float) -> None:
    capacity = rate_of(SimulatedEngine(CPU, seed=1).run(190, SECONDS))
    engine = SimulatedEngine(CPU, slo_ttft_s=slo_ttft_s, slo_tpot_s=0.0032, seed=1)
    served = engine.run(190, SECONDS)
    assert quantile([each.ttft_s for each in settled(served)], 0.99) < 1.1 * slo_ttft_s
    assert quantile([each.tpot_s for each in settled(served)], 0.5) < 0.0032
    assert rate_of(served) > 0.93 * capacity
    assert engine.num_refused > 0.4 * 190 * SECONDS


def test_first_tokens_come_in_time_on_a_machine_that_is_slow_now_and_then() -> None:
    costs = StepCosts(neighbour=4.0)
    capacity = rate_of(SimulatedEngine(costs, seed=1).run(150, SECONDS))
    served = SimulatedEngine(costs, slo_ttft_s=0.15, seed=1).run(150, SECONDS)
    assert quantile([each.ttft_s for each in settled(served)], 0.99) < 1.1 * 0.15
    assert rate_of(served) > 0.9 * capacity


def test_first_tokens_of_those_who_find_a_seat_come_in_time() -> None:
    """With all seats taken, one in eight of them would be late; nobody else is in time."""
    target_s, costs = 0.006, StepCosts(stall_share=0.0)
    served = SimulatedEngine(costs, slo_ttft_s=target_s, slo_tpot_s=0.0032, seed=1).run(190, SECONDS)
    ttfts_s = [each.ttft_s for each in settled(served)]
    assert sum(ttft_s > target_s for ttft_s in ttfts_s) < 0.02 * len(ttfts_s)
    assert rate_of(served) > 0.65 * rate_of(SimulatedEngine(costs, slo_tpot_s=0.0032, seed=1).run(190, SECONDS))


def test_nobody_is_refused_who_would_be_in_time() -> None:
    engine = SimulatedEngine(CPU, slo_ttft_s=0.3, slo_tpot_s=0.0032, seed=1)
    engine.run(45, SECONDS)
    assert engine.num_refused == 0


def test_what_the_loop_does_between_steps_counts_for_the_pace() -> None:
    engine = SimulatedEngine(StepCosts(between_s=1e-3), slo_ttft_s=0.3, slo_tpot_s=0.0032, seed=1)
    served = engine.run(200, SECONDS)
    assert 0.0024 < fmean(each.tpot_s for each in settled(served)) < 0.0032


def test_a_pace_close_to_what_the_weights_take_leaves_room_for_many() -> None:
    served = SimulatedEngine(GPU, max_num_seqs=256, slo_tpot_s=0.0065, slo_ttft_s=1.0, seed=1).run(200, SECONDS)
    assert quantile([each.tpot_s for each in settled(served)], 0.99) < 0.0067
    assert rate_of(served) > 25, "one at a time, they would be 2.6"


def test_a_pace_that_cannot_be_kept_is_not_bought_with_empty_seats() -> None:
    served = SimulatedEngine(GPU, max_num_seqs=256, slo_tpot_s=0.005, slo_ttft_s=1.0, seed=1).run(200, SECONDS)
    assert rate_of(served) > 150
