"""Ends of all kinds, at every moment: stops noticed late, aborts, deadlines, broken draws, broken steps."""

import gc
import itertools

import pytest
from fake_worker import EOS
from scheduler_harness import Harness, endless, ref_counts, seed_for, spans

# Stops


def test_a_stop_is_noticed_a_step_late_and_the_extra_token_is_dropped():
    """With two steps in flight, step 2 is under way for a sequence that step 1 has ended."""
    harness = Harness(steps_in_flight=2)
    harness.add("a", [1, 2, 3], seed=seed_for([1, 2, 3], 2))
    assert [spans(harness.schedule()) for _ in range(2)] == [[(0, 0, 3)], [(0, 3, 4)]]
    harness.collect()
    assert spans(harness.schedule()) == [(0, 4, 5)]
    harness.collect()
    assert harness.received["a", 0].finish_reason == "stop"
    assert harness.manager.num_free_blocks == harness.manager.num_blocks  # free at once: later steps run later
    assert harness.schedule() is None
    assert harness.collect() == []
    harness.check_outputs()
    harness.check_empty()


def test_no_token_ends_a_sequence_before_min_tokens(monkeypatch):
    monkeypatch.setattr("fake_worker.drawn_token", lambda *_: EOS)
    harness = Harness()
    harness.add("a", [1], min_tokens=2)
    harness.add("b", [1], min_tokens=3, stop_token_ids=[EOS], ignore_eos=True)
    harness.run()
    assert harness.received["a", 0].token_ids == [EOS] * 3
    assert harness.received["b", 0].token_ids == [EOS] * 4
    assert (harness.received["a", 0].stop_reason, harness.received["b", 0].stop_reason) == (None, EOS)


def test_the_seat_and_blocks_of_a_late_stop_serve_the_next_request_at_once():
    harness = Harness(num_blocks=2, max_num_seqs=1, steps_in_flight=2)
    harness.add("a", [1, 2, 3], seed=seed_for([1, 2, 3], 2))
    harness.add("b", [4, 5, 6, 7, 8], **endless(3))
    for _ in range(2):
        harness.schedule()
    harness.collect()
    assert spans(harness.schedule()) == [(0, 4, 5)]
    harness.collect()
    assert spans(harness.schedule()) == [(0, 0, 5)]
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_known_end_is_not_computed_past():
    """max_tokens is foreseen, so nothing is scheduled in vain."""
    harness = Harness(steps_in_flight=2)
    harness.add("a", [1, 2, 3], **endless(2))
    assert [plan and spans(plan) for plan in (harness.schedule() for _ in range(3))] == [[(0, 0, 3)], [(0, 3, 4)], None]


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_the_last_token_is_drawn_and_not_computed_wherever_in_a_block_it_stands(steps_in_flight, enable_prefix_caching):
    for num_prompt, max_tokens in itertools.product(range(1, 6), range(1, 10)):
        harness = Harness(steps_in_flight=steps_in_flight, enable_prefix_caching=enable_prefix_caching)
        harness.add("a", [1] * num_prompt, **endless(max_tokens))
        assert sum(plan.num_tokens for plan in harness.run()) == num_prompt + max_tokens - 1
        harness.check_outputs()


# Aborts


def busy_harness(preemption, steps_in_flight):
    """Forks, chunks, a shared prefix and a pool that is too small."""
    harness = Harness(
        num_blocks=8,
        num_host_blocks=8,
        preemption=preemption,
        budget=6,
        steps_in_flight=steps_in_flight,
        max_num_seqs=5,
    )
    harness.add("x", [*range(1, 10)], **endless(9))
    harness.add("target", [*range(1, 8)], n=3, **endless(9))
    harness.add("y", [*range(1, 6)], **endless(9))
    return harness


@pytest.mark.parametrize("index", [None, 0, 2])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_abort_is_safe_at_every_moment(preemption, steps_in_flight, index):
    """Before the first step, in the middle of the prompt, at the fork, swapped out, in flight, after the end."""
    undisturbed = busy_harness(preemption, steps_in_flight)
    num_steps = len(undisturbed.run())
    for moment in range(num_steps + 1):
        harness = busy_harness(preemption, steps_in_flight)
        for _ in range(moment):
            harness.step()
        harness.abort("target", index)
        if index is None:
            assert "target" not in {key[0] for key in harness.live_sequences()}
        harness.run()
        harness.check_outputs()
        harness.check_empty()


def test_aborting_everything_frees_everything_at_once():
    for moment in range(12):
        harness = busy_harness("swap", 2)
        for _ in range(moment):
            harness.step()
        for name in ("x", "target", "y"):
            harness.abort(name)
        assert harness.manager.num_free_blocks == harness.manager.num_blocks
        assert harness.manager.host_pool.num_free == 8
        assert not harness.scheduler.has_work
        harness.run()
        harness.check_empty()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_what_ends_is_gone_without_the_garbage_collector(preemption):
    """Which would hold up a step."""
    harness = busy_harness(preemption, 2)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            harness.step()
        harness.abort("y")
        harness.run()
        harness.check_empty()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_aborting_one_of_n_leaves_the_others():
    harness = Harness()
    harness.add("a", [1, 2, 3], n=3, **endless(5))
    harness.step()
    harness.abort("a", 1)
    assert spans(harness.step()) == [(0, 3, 4), (2, 3, 4)]
    harness.run()
    assert [len(harness.received["a", index].token_ids) for index in range(3)] == [5, 1, 5]
    harness.check_outputs()


def test_unknown_requests_are_not_missed():
    harness = Harness()
    harness.abort("nobody")
    harness.add("a", [1], **endless(1))
    harness.abort("a", 5)
    harness.run()
    harness.abort("a")
    harness.check_empty()


def test_an_id_can_be_used_again_while_its_last_steps_are_in_flight():
    harness = Harness(steps_in_flight=2)
    harness.add("a", [1, 2, 3], **endless(5))
    harness.schedule()
    harness.schedule()
    harness.abort("a")
    harness.add("a", [4, 5], **endless(2))
    harness.run()
    harness.check_outputs()
    harness.check_empty()


# Deadlines


def test_a_passed_deadline_ends_a_request_wherever_it_is():
    harness = Harness(num_blocks=4, max_num_seqs=2)
    harness.add("running", [1, 2], deadline_s=10.0, **endless())
    harness.add("waiting", [1] * 13, deadline_s=11.0, **endless())
    harness.add("patient", [1, 2], deadline_s=99.0, **endless(3))
    harness.step()
    assert harness.scheduler.expire(9.9) == []
    harness.receive(harness.scheduler.expire(10.0))
    harness.check()
    assert harness.errors["running"].error_kind == "deadline"
    harness.receive(harness.scheduler.expire(50.0))
    assert harness.errors.keys() == {"running", "waiting"}
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_request_that_ended_in_time_does_not_expire():
    harness = Harness()
    harness.add("a", [1], deadline_s=10.0, **endless(1))
    harness.run()
    harness.add("a", [1], deadline_s=20.0, **endless(1))
    assert harness.scheduler.expire(15.0) == []
    harness.run()
    harness.check_outputs()


# Broken draws and steps


def test_a_broken_draw_fails_its_request_and_no_other():
    harness = Harness()
    for name in "abc":
        harness.add(name, [ord(name)] * 5, n=1 + (name == "b"), **endless(3))
    harness.worker.failing_draws.add((1, 1))  # the first of b's two sequences
    harness.run()
    assert harness.errors.keys() == {"b"}
    assert (harness.errors["b"].error, harness.errors["b"].error_kind) == ("not finite", "internal")
    harness.check_outputs()
    harness.check_empty()


def test_what_a_broken_draw_computed_is_not_found_again():
    harness = Harness()
    harness.worker.failing_draws.add((0, 0))
    harness.add("a", [*range(1, 10)], **endless(3))
    harness.run()
    harness.add("b", [*range(1, 10)], **endless(3))
    assert spans(harness.step()) == [(0, 0, 9)]


def test_a_draw_that_breaks_for_a_sequence_that_has_ended_is_nobodys_error():
    harness = Harness(steps_in_flight=2)
    harness.add("a", [1, 2, 3], n=2, seed=seed_for([1, 2, 3], 1))  # sequence 0 ends at once
    harness.worker.failing_draws.add((1, 0))
    harness.run()
    assert harness.received["a", 0].finish_reason == "stop"
    assert not harness.errors
    harness.check_outputs()


def test_a_broken_draw_at_the_fork_fails_the_children_though_the_parent_was_aborted():
    harness = Harness()
    harness.worker.failing_draws.add((0, 0))
    harness.add("a", [1, 2, 3], n=2, **endless(3))
    harness.schedule()
    harness.abort("a", 0)
    harness.collect()
    assert harness.errors.keys() == {"a"}
    harness.check_empty()


def test_a_broken_step_fails_what_it_computed_and_the_engine_goes_on():
    harness = Harness(max_num_seqs=2)
    harness.worker.broken_steps.add(1)
    harness.add("a", [1, 2, 3], **endless(4))
    harness.add("b", [4, 5, 6], **endless(4))
    harness.add("c", [7, 8, 9], **endless(4))
    harness.run()
    assert harness.errors.keys() == {"a", "b"}
    assert harness.errors["a"].error_kind == "internal"
    assert harness.received["c", 0].finish_reason == "length"
    harness.check_outputs()
    harness.check_empty()


def test_what_was_cached_is_not_trusted_after_a_broken_step():
    harness = Harness()
    harness.worker.broken_steps.add(0)
    harness.add("a", [*range(1, 10)], **endless(3))
    harness.run()
    harness.add("b", [*range(1, 10)], **endless(3))
    assert spans(harness.step()) == [(0, 0, 9)]
    harness.run()
    harness.check_outputs()


def test_a_request_that_built_on_a_broken_step_fails_with_it():
    """b is planned before step 0 breaks, on blocks that step 0 should have filled."""
    harness = Harness(steps_in_flight=2)
    harness.worker.broken_steps.add(0)
    harness.add("a", [*range(1, 10)], **endless(3))
    harness.schedule()
    harness.add("b", [*range(1, 10)], **endless(3))
    assert spans(harness.schedule()) == [(0, 9, 10), (1, 8, 9)]
    harness.run()
    assert harness.errors.keys() == {"a", "b"}
    harness.check_empty()


def test_a_sequence_swapped_out_by_a_broken_step_is_computed_again():
    harness = Harness(num_blocks=4, num_host_blocks=4, preemption="swap")
    harness.add("a", [1, 2, 3, 4, 5, 6], **endless(4))
    harness.add("b", [11, 12, 13, 14, 15], **endless(6))
    harness.worker.broken_steps.add(3)
    for _ in range(3):
        harness.step()
    assert harness.step().swap_out == [(2, 0), (3, 1)]
    assert harness.errors.keys() == {"a"}
    assert harness.scheduler.num_swapped == 0
    assert spans(harness.step()) == [(0, 0, 8)]
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_broken_fork_fails_the_children_though_the_parent_was_aborted():
    harness = Harness()
    harness.worker.broken_steps.add(0)
    harness.add("a", [1, 2, 3], n=2, **endless(3))
    harness.schedule()
    harness.abort("a", 0)
    harness.collect()
    assert harness.errors.keys() == {"a"}
    harness.check_empty()


def test_closing_fails_everybody():
    harness = busy_harness("swap", 2)
    for _ in range(5):
        harness.step()
    harness.receive(harness.scheduler.abort_all("the engine was closed"))
    assert harness.errors.keys() == {"x", "target", "y"}
    assert ref_counts(harness) == [0] * 8
    harness.run()
    harness.check_empty()
