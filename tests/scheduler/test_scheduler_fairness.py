"""Priorities, ageing, and that nobody waits for ever."""

import pytest
from scheduler_harness import Harness, endless, spans

from cupy_engine.request_queue import FcfsPolicy, PriorityPolicy


def priority_harness(ageing_s=1000.0, **options):
    return Harness(policy=PriorityPolicy(ageing_s), **options)


def finishing_order(harness):
    """Run to the end; request ids in the order in which they end."""
    order = []
    while harness.scheduler.has_work:
        harness.step()
        ended = [key[0] for key, received in harness.received.items() if received.finish_reason and key[0] not in order]
        order.extend(ended)
    return order


def test_a_lower_priority_value_goes_first():
    harness = priority_harness(max_num_seqs=1)
    for name, priority in (("c", 2), ("a", 0), ("b", 1)):
        harness.add(name, [1], priority=priority, **endless(2))
    assert finishing_order(harness) == ["a", "b", "c"]


def test_equal_priorities_are_served_in_order_of_arrival():
    harness = priority_harness(max_num_seqs=1)
    for name, arrival_time_s in (("b", 2.0), ("c", 3.0), ("a", 1.0)):
        harness.add(name, [1], priority=7, arrival_time_s=arrival_time_s, **endless(2))
    assert finishing_order(harness) == ["a", "b", "c"]


def test_first_come_first_served_ignores_priorities():
    harness = Harness(max_num_seqs=1, policy=FcfsPolicy())
    harness.add("a", [1], priority=9, **endless(2))
    harness.add("b", [1], priority=0, **endless(2))
    assert finishing_order(harness) == ["a", "b"]


def test_an_urgent_request_takes_the_seat_of_the_least_urgent():
    harness = priority_harness(max_num_seqs=2)
    harness.add("low", [1, 1, 1], priority=5, **endless(4))
    harness.add("lowest", [2, 2, 2], priority=6, **endless(4))
    harness.step()
    harness.add("urgent", [3, 3, 3], priority=0, **endless(1))
    plan = harness.step()
    assert spans(plan) == [(0, 3, 4), (1, 0, 3)]
    assert plan.slot_setups[0].token_ids == [3, 3, 3]
    assert finishing_order(harness) == ["urgent", "low", "lowest"]
    harness.check_outputs()


def test_an_urgent_request_takes_the_blocks_of_the_least_urgent():
    harness = priority_harness(num_blocks=4, num_host_blocks=4, preemption="swap")
    harness.add("low", [1] * 7, priority=5, **endless(4))
    harness.add("lowest", [2] * 7, priority=6, **endless(4))
    harness.step()
    harness.add("urgent", [3] * 7, priority=0, **endless(1))
    plan = harness.step()
    assert plan.swap_out == [(2, 0), (3, 1)]
    assert spans(plan) == [(0, 7, 8), (1, 0, 7)]
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_an_urgent_request_pushes_nobody_out_if_that_would_not_let_it_in():
    """It needs 3 of 4 blocks; the one that may be pushed out has 1, another as urgent as itself has 2, 1 is free."""
    harness = priority_harness(num_blocks=4)
    harness.add("as-urgent", [1] * 7, priority=0, **endless(2))
    harness.add("low", [2] * 2, priority=5, **endless(2))
    harness.step()
    harness.add("urgent", [3] * 11, priority=0, arrival_time_s=1000, **endless(1))
    harness.scheduler.schedule()
    assert harness.scheduler.num_running == 2
    assert harness.scheduler.num_waiting == 1


def test_an_urgent_request_pushes_nobody_out_if_there_is_room():
    harness = priority_harness()
    harness.add("low", [1], priority=5, **endless(4))
    harness.step()
    harness.add("urgent", [2], priority=0, **endless(4))
    assert spans(harness.step()) == [(0, 1, 2), (1, 0, 1)]


def test_equals_do_not_push_each_other_out():
    harness = priority_harness(max_num_seqs=1)
    harness.add("first", [1], priority=3, arrival_time_s=10, **endless(4))
    harness.step()
    harness.add("earlier", [2], priority=3, arrival_time_s=1, **endless(4))
    assert spans(harness.step()) == [(0, 1, 2)]
    assert finishing_order(harness) == ["first", "earlier"]


def test_a_running_request_that_has_aged_is_not_pushed_out():
    harness = Harness(max_num_seqs=1, policy=PriorityPolicy(ageing_s=10.0))
    harness.add("old", [1], priority=3, arrival_time_s=100, **endless(3))
    harness.step()
    harness.add("31 s later", [2], priority=0, arrival_time_s=131, **endless(2))
    assert spans(harness.step()) == [(0, 1, 2)]
    harness.add("29 s later", [3], priority=0, arrival_time_s=129, **endless(2))
    assert spans(harness.step()) == [(0, 0, 1)]
    assert finishing_order(harness) == ["29 s later", "old", "31 s later"]


def test_who_has_waited_long_enough_can_no_longer_be_overtaken():
    """With ageing_s = 10, a lead of 3 levels is worth an arrival 30 s earlier."""
    policy = PriorityPolicy(ageing_s=10.0)
    harness = Harness(max_num_seqs=1, policy=policy)
    harness.add("running", [1], priority=-9, arrival_time_s=0, **endless(2))
    harness.step()
    harness.add("old", [1], priority=3, arrival_time_s=100, **endless(2))
    harness.add("29 s later", [1], priority=0, arrival_time_s=129, **endless(2))
    harness.add("31 s later", [1], priority=0, arrival_time_s=131, **endless(2))
    assert finishing_order(harness) == ["running", "29 s later", "old", "31 s later"]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("policy", [FcfsPolicy(), PriorityPolicy(ageing_s=5.0)], ids=["fcfs", "priority"])
def test_nobody_starves_under_endless_load(policy, preemption):
    """A request arrives in every step, more than the pool can serve; an unlucky one of lowest priority is among them.

    Its priority of 4 is worth 20 s, so only the 20 requests that arrive in that time, and those that were there before,
    go first (and the two that run beside it may end first). It ends while the load still goes on.
    """
    harness = Harness(
        num_blocks=8,
        num_host_blocks=4,
        max_num_seqs=3,
        budget=8,
        policy=policy,
        preemption=preemption,
        steps_in_flight=2,
    )
    for i in range(20):
        harness.add(f"before {i}", [1 + i % 3] * 9, **endless(6))
    harness.add("unlucky", [5] * 9, priority=4, **endless(6))
    arrived_later = 0
    while not harness.received["unlucky", 0].finish_reason:
        harness.add(f"later {arrived_later}", [1 + arrived_later % 3] * 9, **endless(6))
        arrived_later += 1
        harness.step()
        assert arrived_later < 1000, "starved"
    served_first = [
        key[0] for key, received in harness.received.items() if received.finish_reason and key[0].startswith("later")
    ]
    assert len(served_first) <= 2 + (0 if isinstance(policy, FcfsPolicy) else 20)
    assert harness.scheduler.num_waiting > 50  # the load never let up
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_decodes_never_wait_for_prompts():
    """Whatever long prompts arrive, a running sequence gets its token in every step."""
    harness = Harness(num_blocks=64, max_num_seqs=16, budget=6)
    harness.add("talking", [1], **endless(60))
    harness.step()
    for i in range(20):
        if i % 4 == 0:
            harness.add(f"long {i}", [2 + i] * 30, **endless(1))
        assert (0, 1 + i, 2 + i) in spans(harness.step())
