"""Making room: who loses seat and blocks, how they come back, and that nothing streamed is lost or repeated.

The usual scene: four blocks of 4 tokens, a holds two and b holds two; when a needs a third, b has to go.
"""

import pytest
from scheduler_harness import Harness, endless, spans

from cupy_engine.plan import BlockTableWrite
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.scheduler_listener import SchedulerListener

PROMPT_A, PROMPT_B = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15]


def two_in_four_blocks(**options):
    harness = Harness(num_blocks=4, **options)
    harness.add("a", PROMPT_A, **endless(4))
    harness.add("b", PROMPT_B, **endless(6))
    return harness


def test_the_last_to_come_makes_room_and_is_computed_again():
    harness = two_in_four_blocks()
    assert [spans(harness.step()) for _ in range(3)] == [
        [(0, 0, 6), (1, 0, 5)],
        [(0, 6, 7), (1, 5, 6)],
        [(0, 7, 8), (1, 6, 7)],
    ]
    assert harness.manager.num_free_blocks == 0

    tight = harness.step()
    assert spans(tight) == [(0, 8, 9)]
    assert tight.block_table_writes == [BlockTableWrite(0, 2, [3])]  # b's last block: the oldest of the free ones
    assert (tight.swap_out, harness.scheduler.num_waiting) == ([], 1)

    again = harness.step()  # a has ended; b finds its own first block in the cache
    drawn = harness.received["b", 0].token_ids[:3]
    (setup,), (entry,) = again.slot_setups, again.sequences
    assert (setup.slot, setup.token_ids, setup.num_prompt_tokens) == (0, PROMPT_B + drawn, 5)
    assert (entry.start, entry.num_tokens, entry.token_ids) == (4, 4, [15, *drawn])
    assert again.block_table_writes[0] == BlockTableWrite(0, 0, [2])

    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_the_last_to_come_makes_room_and_is_swapped_out_and_in():
    harness = two_in_four_blocks(num_host_blocks=4, preemption="swap")
    for _ in range(3):
        harness.step()

    tight = harness.step()
    assert tight.swap_out == [(2, 0), (3, 1)]
    assert spans(tight) == [(0, 8, 9)]
    assert (harness.scheduler.num_waiting, harness.scheduler.num_swapped) == (1, 1)

    again = harness.step()
    (entry,) = again.sequences
    assert again.swap_in == [(0, 2), (1, 3)]
    assert again.block_table_writes == [BlockTableWrite(0, 0, [2, 3])]
    assert (entry.start, entry.num_tokens) == (7, 1)  # goes on where it stopped
    assert entry.token_ids == harness.received["b", 0].token_ids[2:3]  # the new seat does not know it
    assert harness.manager.host_pool.num_free == 4

    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_full_host_pool_falls_back_to_computing_again():
    harness = two_in_four_blocks(num_host_blocks=1, preemption="swap")
    plans = harness.run()
    assert [plan.swap_out for plan in plans if plan.swap_out] == []
    assert len(plans[4].slot_setups) == 1
    harness.check_outputs()


def test_a_newcomer_waits_behind_the_one_that_made_room():
    harness = two_in_four_blocks()
    for _ in range(3):
        harness.step()
    harness.add("tiny", [9], **endless(1))
    assert spans(harness.step()) == [(0, 8, 9)]
    assert harness.scheduler.num_waiting == 2
    harness.run()
    harness.check_outputs()


def test_a_sequence_may_have_to_make_room_for_itself():
    """The last in line finds no block: it waits until those before it have ended."""
    harness = Harness(num_blocks=4)
    harness.add("a", [1] * 8, **endless(2))
    harness.add("b", [2] * 8, **endless(2))
    assert spans(harness.step()) == [(0, 0, 8), (1, 0, 8)]
    assert spans(harness.step()) == [(0, 8, 9)]
    assert spans(harness.step()) == [(0, 4, 9)]
    harness.run()
    harness.check_outputs()


def test_a_prompt_in_the_middle_makes_room_too_with_the_seats_of_its_forks():
    harness = Harness(num_blocks=5, budget=10, max_num_seqs=4)
    harness.add("a", [1] * 8, **endless(6))
    harness.add("b", [2] * 11, n=3, **endless(2))
    assert spans(harness.step()) == [(0, 0, 8), (1, 0, 2)]
    assert harness.scheduler.seats.num_free == 0
    assert spans(harness.step()) == [(0, 8, 9)]
    assert harness.scheduler.seats.num_free == 3
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_sequence_whose_token_is_in_flight_waits_for_it():
    """b is pushed out while step 2 still draws its third token. It does not come back before it knows that token."""
    harness = two_in_four_blocks(steps_in_flight=2)
    for _ in range(3):
        harness.step()
    tight = harness.schedule()
    assert spans(tight) == [(0, 8, 9)]
    harness.abort("a")
    assert len(harness.received["b", 0].token_ids) == 2
    assert harness.schedule() is None  # there is room for b, but not yet its token
    harness.collect()
    assert len(harness.received["b", 0].token_ids) == 3
    again = harness.schedule()
    assert again.slot_setups[0].token_ids == PROMPT_B + harness.received["b", 0].token_ids
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_swapped_sequence_may_end_by_the_token_in_flight():
    harness = Harness(num_blocks=4, num_host_blocks=4, preemption="swap", steps_in_flight=2)
    harness.add("a", PROMPT_A, **endless(4))
    harness.add("b", PROMPT_B, **endless(3))
    for _ in range(3):
        harness.step()
    assert harness.schedule().swap_out == [(2, 0), (3, 1)]
    harness.collect()
    assert harness.received["b", 0].finish_reason == "length"
    assert harness.manager.host_pool.num_free == 4
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_a_listener_hears_of_every_request_once_however_often_it_is_seated():
    class Listener(SchedulerListener):
        def __init__(self):
            self.events = []

        def on_admitted(self, request):
            self.events.append(f"admitted {request.request_id}, {request.num_cached_tokens} cached")

        def on_preempted(self, how):
            self.events.append(f"preempted by {how}")

        def on_tokens(self, sequences):
            self.events += [f"token {len(s.token_ids)} of {s.request.request_id}" for s in sequences]

        def on_finished(self, sequence):
            self.events.append(f"finished {sequence.request.request_id} by {sequence.finish_reason}")

    listener = Listener()
    harness = Harness(num_blocks=4, budget=12, listener=listener)
    harness.add("a", [1] * 8, **endless(2))
    harness.add("b", [2] * 7, **endless(1))  # pushed out in the middle of its prompt, then finds 4 tokens cached
    harness.run()
    assert listener.events == [
        "admitted a, 0 cached",
        "admitted b, 0 cached",
        "token 9 of a",
        "preempted by recompute",
        "token 10 of a",
        "finished a by length",
        "token 8 of b",
        "finished b by length",
    ]
    assert harness.received["b", 0].num_cached_tokens == 0


@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_crowd_in_a_tiny_pool_gets_the_tokens_it_would_get_alone(preemption, steps_in_flight):
    harness = Harness(
        num_blocks=9, num_host_blocks=6, preemption=preemption, max_num_seqs=8, steps_in_flight=steps_in_flight
    )
    for i in range(12):
        harness.add(f"r{i}", [*range(i % 3, 9 + i % 5)], n=1 + i % 3, **endless(20))
    plans = harness.run()
    num_seated = sum(len(plan.slot_setups) for plan in plans)
    assert num_seated > 24 + 5  # many were seated again
    assert any(plan.swap_out for plan in plans) == (preemption == "swap")
    harness.check_outputs()
    harness.check_empty()


def test_auto_compares_what_computing_and_copying_would_take():
    costs = PreemptionCosts("auto", bytes_per_block=1000, copy_bytes_per_s=1e6, prefill_s_per_token=0.001)
    assert costs.recompute_s(100) == pytest.approx(0.1)
    assert costs.swap_s(7) == pytest.approx(0.014)  # out and in
    assert costs.prefers_swap(100, 7)
    assert not costs.prefers_swap(13, 7)
    assert not PreemptionCosts("recompute", 1, 1.0).prefers_swap(10**9, 0)
    assert PreemptionCosts("swap", 1, 1.0).prefers_swap(0, 10**9)


def test_the_cost_of_computing_follows_what_steps_took():
    costs = PreemptionCosts("auto", bytes_per_block=1, copy_bytes_per_s=1.0, prefill_s_per_token=1.0)
    costs.observe_prefill(num_tokens=100, duration_s=50.0)
    assert costs.prefill_s_per_token == pytest.approx(0.95)
    for _ in range(200):
        costs.observe_prefill(num_tokens=100, duration_s=50.0)
    assert costs.prefill_s_per_token == pytest.approx(0.5)
