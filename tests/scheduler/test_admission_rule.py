"""Who is turned away, when, and until when."""

from __future__ import annotations

import pytest

from cupy_engine.errors import QueueFullError
from cupy_engine.overload import AdmissionRule, EngineLoad, LoadMeter, Overruns
from cupy_engine.step_pace import StepPace


def refusal(rule: AdmissionRule, load: EngineLoad, num_new: int = 1) -> QueueFullError:
    with pytest.raises(QueueFullError) as caught:
        rule.check(load, num_new)
    return caught.value


def test_a_full_queue_refuses_and_says_when_it_will_have_drained():
    rule = AdmissionRule(max_queue_len=4)
    rule.check(EngineLoad(num_waiting=3))
    rule.check(EngineLoad(num_running=100, num_waiting=0), num_new=4)
    error = refusal(rule, EngineLoad(num_waiting=4, ended_per_s=0.5))
    assert (error.reason, error.retry_after_s) == ("queue_full", 10.0)
    assert "max_queue_len" in str(error)
    assert refusal(rule, EngineLoad(num_waiting=2), num_new=3).retry_after_s == 1.0, "nothing is known yet"
    assert refusal(rule, EngineLoad(num_waiting=4, ended_per_s=0.001)).retry_after_s == 60.0


def test_who_would_get_a_first_token_too_late_is_refused():
    rule = AdmissionRule(max_queue_len=1000, slo_ttft_s=2.0)
    rule.check(EngineLoad(num_waiting=4, ended_per_s=5.0, overrun_s=0.5))
    error = refusal(rule, EngineLoad(num_waiting=29, ended_per_s=5.0, overrun_s=0.5))
    assert (error.reason, error.retry_after_s) == ("slo_ttft", 4.5)
    assert "6.5 s" in str(error)
    rule.check(EngineLoad(num_waiting=500))  # nothing is known yet
    rule.check(EngineLoad(num_free=1, ended_per_s=0.1, overrun_s=9.0))  # nobody could serve it earlier
    refusal(rule, EngineLoad(num_running=8, ended_per_s=0.1))  # nobody waits, but all seats are taken


def test_the_rate_is_measured_only_while_the_engine_is_full() -> None:
    meter = LoadMeter()
    assert meter.ended_per_s is None
    meter.observe(0.0, 0, is_full=False)
    meter.observe(100.0, 7, is_full=True)
    assert meter.ended_per_s is None, "it was not full in those 100 s"
    for second in range(1, 41):
        meter.observe(100.0 + second, 7 + 20 * second, is_full=True)
    assert meter.ended_per_s == pytest.approx(20.0, rel=0.03)
    meter.observe(140.5, 807, is_full=False)
    before = meter.ended_per_s
    meter.observe(500.0, 808, is_full=True)
    assert meter.ended_per_s == before


def test_the_rate_follows_changes() -> None:
    meter = LoadMeter()
    for second in range(20):
        meter.observe(float(second), 100 * second, is_full=True)
    for second in range(20, 60):
        meter.observe(float(second), 1900 + second, is_full=True)
    assert meter.ended_per_s == pytest.approx(1.0, abs=0.6)


def test_overruns_are_remembered_for_a_while() -> None:
    overruns = Overruns(target_s=0.1)
    assert overruns.high_s == 0.0
    for number in range(200):
        overruns.observe(number / 100, 0.001 * (number % 100))
    assert overruns.high_s == pytest.approx(0.099)
    overruns.observe(11.5, 0.002)
    assert overruns.high_s == pytest.approx(0.099), "those of the second half are not ten seconds old"
    overruns.forget(12.5)
    assert overruns.high_s == pytest.approx(0.002)
    overruns.forget(30.0)
    assert overruns.high_s == 0.0


def test_overruns_are_remembered_for_longer_where_requests_may_take_longer() -> None:
    overruns = Overruns(target_s=60.0)
    overruns.observe(0.0, 7.0)
    overruns.forget(239.0)
    assert overruns.high_s == 7.0


def test_a_worker_goes_on_from_the_engines_last_word():
    word = EngineLoad(num_running=8, num_waiting=10, ended_per_s=20.0)
    assert word.later(0.2, num_new=3).num_waiting == 9
    assert word.later(5.0, num_new=0).num_waiting == 0
    assert EngineLoad(num_free=0).later(0.2, num_new=3).num_waiting == 3


def test_newcomers_take_the_free_seats_before_they_wait() -> None:
    word = EngineLoad(num_running=5, num_waiting=1, num_free=3, ended_per_s=20.0)
    few, many = word.later(0.2, num_new=2), word.later(0.2, num_new=5)
    assert (few.num_free, few.num_waiting) == (1, 1)
    assert (many.num_free, many.num_waiting) == (0, 3), "nobody makes room where there is some"
    assert few.wait_s == 1 / 20
    assert many.wait_s == 4 / 20


def test_pace_learns_fixed_and_growing_time() -> None:
    pace = StepPace(target_s=0.1)
    assert pace.max_sequences() is None
    for num_tokens in (10, 20, 40, 30, 15) * 4:
        pace.observe(num_tokens, num_tokens, 0.010 + 0.001 * num_tokens)
    assert pace.max_sequences() == pytest.approx(0.9 * (0.1 - 0.010) / 0.001, abs=1)


def test_pace_makes_room_for_prompts() -> None:
    pace = StepPace(target_s=0.1)
    for _ in range(50):  # a sequence of 32 + 32 tokens begins, and ends, in every other step
        pace.observe(16, 16, 0.010 + 0.001 * 16)
        pace.observe(48, 16, 0.010 + 0.001 * 48)
    assert pace.max_sequences() == pytest.approx(40, abs=1)


def test_pace_knows_that_a_target_just_above_the_fixed_time_leaves_room() -> None:
    pace = StepPace(target_s=0.0065)
    for num_tokens in (1, 30, 2, 40) * 10:
        pace.observe(num_tokens, num_tokens, 0.006 + 0.00002 * num_tokens)
    assert pace.max_sequences() == pytest.approx(22, abs=1)


def test_a_target_that_no_step_meets_holds_up_nobody_in_vain() -> None:
    pace = StepPace(target_s=0.005)
    for num_tokens in (1, 30, 2, 40) * 10:
        pace.observe(num_tokens, num_tokens, 0.006 + 0.00002 * num_tokens)
    assert pace.max_sequences() == pytest.approx(300, abs=5), "they double the time of a step"
    for _ in range(400):
        pace.observe(1, 1, 0.008)
        pace.observe(20, 20, 0.006)
    assert pace.max_sequences() is None, "the time does not depend on them"


def test_pace_of_steps_of_one_size_grows_step_by_step() -> None:
    pace = StepPace(target_s=0.1)
    for _ in range(10):
        pace.observe(32, 32, 0.04)
    assert pace.max_sequences() == 72
    for _ in range(300):
        pace.observe(64, 64, 0.2)
    assert pace.max_sequences() in range(28, 34), "and shrinks when steps get slower"
    for _ in range(6000):
        pace.observe(1, 1, 9.0)
    assert pace.max_sequences() == 1


def test_pace_lets_one_run_where_one_is_too_slow() -> None:
    pace = StepPace(target_s=0.1)
    for _ in range(10):
        pace.observe(1, 1, 0.4)
    assert pace.max_sequences() == 1


def test_pace_keeps_to_its_answer_while_it_is_about_right() -> None:
    pace, answers = StepPace(target_s=0.1), set()
    for step in range(400):
        num_tokens = 8 + step % 8
        pace.observe(num_tokens, num_tokens, (0.020 + 0.005 * num_tokens) * (1.05 if step % 100 < 50 else 0.95))
        if step >= 100:
            answers.add(pace.max_sequences())
    assert len(answers) == 1
