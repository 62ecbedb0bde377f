"""Plans, step by step: what a request is given, in which slot and blocks, and who goes first. Blocks of 4 tokens."""

import pytest
from fake_worker import EOS
from scheduler_harness import Harness, endless, spans

from cupy_engine.errors import InvalidRequestError
from cupy_engine.plan import BlockTableWrite, ScheduledSequence
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.step_pace import StepPace


def test_the_life_of_a_request():
    harness = Harness()
    harness.add("a", [5, 6, 7, 8, 9, 10], **endless(max_tokens=4, seed=3))

    first = harness.step()
    (setup,) = first.slot_setups
    assert (setup.slot, setup.seed, setup.token_ids, setup.num_prompt_tokens) == (0, 3, [5, 6, 7, 8, 9, 10], 6)
    assert setup.params == SamplingParams(**endless(max_tokens=4, seed=3))
    assert first.block_table_writes == [BlockTableWrite(slot=0, first=0, block_ids=[0, 1])]
    assert first.sequences == [
        ScheduledSequence(slot=0, start=0, num_tokens=6, token_ids=[5, 6, 7, 8, 9, 10], sample_slots=[0])
    ]

    second, third = harness.step(), harness.step()
    assert second.sequences == [ScheduledSequence(slot=0, start=6, num_tokens=1, token_ids=[], sample_slots=[0])]
    assert third.sequences == [ScheduledSequence(slot=0, start=7, num_tokens=1, token_ids=[], sample_slots=[0])]
    assert second.slot_setups == third.slot_setups == second.block_table_writes == third.block_table_writes == []

    fourth = harness.step()
    assert fourth.block_table_writes == [BlockTableWrite(slot=0, first=2, block_ids=[2])]
    assert spans(fourth) == [(0, 8, 9)]
    assert [plan.step_id for plan in (first, second, third, fourth)] == [0, 1, 2, 3]

    assert harness.schedule() is None
    assert harness.received["a", 0].finish_reason == "length"
    harness.check_outputs()
    harness.check_empty()


def test_a_long_prompt_comes_in_chunks_and_draws_after_the_last():
    harness = Harness(budget=4)
    harness.add("a", list(range(1, 11)), **endless())
    plans = [harness.step() for _ in range(4)]
    assert [spans(plan) for plan in plans] == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10)], [(0, 10, 11)]]
    assert [plan.sequences[0].sample_slots for plan in plans] == [[], [], [0], [0]]
    assert [write.block_ids for plan in plans for write in plan.block_table_writes] == [[0], [1], [2]]


def test_decodes_go_on_while_a_prompt_is_computed_in_what_they_leave():
    harness = Harness(budget=4)
    harness.add("a", [1, 2], **endless())
    harness.step()
    harness.add("b", list(range(1, 10)), **endless())
    assert [spans(harness.step()) for _ in range(4)] == [
        [(0, 2, 3), (1, 0, 3)],
        [(0, 3, 4), (1, 3, 6)],
        [(0, 4, 5), (1, 6, 9)],
        [(0, 5, 6), (1, 9, 10)],
    ]


def test_a_chunk_leaves_room_for_the_decodes_behind_it():
    """Request b arrived first but reached the scheduler late: it goes first, and a still gets its token."""
    harness = Harness(budget=4)
    harness.add("a", [1, 2], arrival_time_s=20, **endless())
    harness.step()
    harness.add("b", list(range(1, 10)), arrival_time_s=10, **endless())
    harness.step()
    assert spans(harness.step()) == [(1, 3, 6), (0, 3, 4)]


def test_steps_that_hold_up_decodes_are_smaller():
    harness = Harness(budget=8, mixed_budget=3)
    harness.add("a", list(range(1, 10)), **endless())
    assert spans(harness.step()) == [(0, 0, 8)]
    harness.step()
    harness.add("b", list(range(20, 28)), **endless())
    harness.add("c", list(range(40, 48)), **endless())
    assert [spans(harness.step()) for _ in range(3)] == [
        [(0, 9, 10), (1, 0, 3)],
        [(0, 10, 11), (1, 3, 6)],
        [(0, 11, 12), (1, 6, 8), (2, 0, 1)],
    ]
    harness.abort("a")
    harness.abort("b")
    assert spans(harness.step()) == [(2, 1, 8)]


def test_decodes_take_nothing_from_the_prompts_of_a_mixed_step():
    harness = Harness(budget=64, mixed_budget=2)
    for name in "abc":
        harness.add(name, [1, 2], **endless())
    harness.step()
    harness.add("d", [3, 4, 5], **endless())
    assert spans(harness.step()) == [(0, 2, 3), (1, 2, 3), (2, 2, 3), (3, 0, 2)]


class FixedPace(StepPace):
    """As if more sequences were too slow."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__(1.0)
        self.num_sequences = num_sequences

    def max_sequences(self) -> int:
        return self.num_sequences


def test_requests_wait_while_one_more_would_make_streams_wait_too_long():
    harness = Harness(budget=64, pace=FixedPace(2))
    for name in "abc":
        harness.add(name, [1, 2], **endless(max_tokens=2))
    assert spans(harness.step()) == [(0, 0, 2), (1, 0, 2)]
    assert spans(harness.step()) == [(0, 2, 3), (1, 2, 3)]
    assert spans(harness.step()) == [(1, 0, 2)], "c has got a seat"


def test_streams_that_run_go_on_however_slow_steps_become():
    pace = FixedPace(3)
    harness = Harness(budget=64, pace=pace)
    for name in "abc":
        harness.add(name, [1, 2], **endless())
    harness.step()
    pace.num_sequences = 1
    assert spans(harness.step()) == [(0, 2, 3), (1, 2, 3), (2, 2, 3)]
    harness.abort("a")
    harness.abort("b")
    harness.add("d", [1, 2], **endless())
    assert spans(harness.step()) == [(2, 3, 4)], "there is one already"


def test_who_needs_more_seats_than_are_in_time_gets_them_when_nobody_runs():
    harness = Harness(budget=64, pace=FixedPace(1))
    harness.add("a", [1, 2], **endless(n=3))
    assert spans(harness.step()) == [(0, 0, 2)]
    assert len(spans(harness.step())) == 3


def test_waiting_requests_share_what_is_left_of_the_budget():
    harness = Harness(budget=8)
    for name in "abc":
        harness.add(name, [1, 2, 3], **endless())
    assert spans(harness.step()) == [(0, 0, 3), (1, 0, 3), (2, 0, 2)]
    assert spans(harness.step()) == [(0, 3, 4), (1, 3, 4), (2, 2, 3)]


def test_no_more_sequences_run_than_there_are_seats():
    harness = Harness(max_num_seqs=2)
    for name, max_tokens in (("a", 3), ("b", 2), ("c", 3)):
        harness.add(name, [1, 2], **endless(max_tokens))
    assert [spans(harness.step()) for _ in range(3)] == [
        [(0, 0, 2), (1, 0, 2)],
        [(0, 2, 3), (1, 2, 3)],
        [(0, 3, 4), (1, 0, 2)],  # b has left its seat to c
    ]


def test_first_come_first_served_lets_nobody_overtake():
    """The small request behind one that does not fit waits with it: overtaking could go on for ever."""
    harness = Harness(num_blocks=4)
    harness.add("a", [1] * 9, **endless(max_tokens=3))
    harness.step()
    harness.add("big", [2] * 8, **endless(max_tokens=1))
    harness.add("small", [3], **endless(max_tokens=1))
    assert spans(harness.step()) == [(0, 9, 10)]
    assert harness.scheduler.num_waiting == 2
    assert spans(harness.step()) == [(0, 10, 11)]
    assert spans(harness.step()) == [(0, 0, 8), (1, 0, 1)]


def test_a_budget_of_one_token_is_enough():
    harness = Harness(budget=1)
    harness.add("a", [1, 2, 3], **endless(2))
    harness.add("b", [1, 2], **endless(2))
    plans = harness.run()
    assert [spans(plan) for plan in plans] == [
        [(0, 0, 1)],
        [(0, 1, 2)],
        [(0, 2, 3)],
        [(0, 3, 4)],
        [(0, 0, 1)],
        [(0, 1, 2)],
        [(0, 2, 3)],
    ]
    harness.check_outputs()


def test_forks_beyond_the_budget_wait_for_their_turn():
    harness = Harness(budget=2)
    harness.add("a", [1, 2], n=3, **endless(4))
    assert [spans(plan) for plan in harness.run()] == [
        [(0, 0, 2)],
        *([(0, i, i + 1), (1, i, i + 1)] for i in (2, 3, 4)),
        *([(2, i, i + 1)] for i in (2, 3, 4)),
    ]
    harness.check_outputs()


def test_nothing_to_do_is_no_plan():
    assert Harness().schedule() is None


def test_a_sequence_ends_at_the_model_length():
    harness = Harness(max_model_len=8)
    harness.add("a", [1, 2, 3], ignore_eos=True, max_tokens=None)
    harness.run()
    assert len(harness.received["a", 0].token_ids) == 5
    assert harness.received["a", 0].finish_reason == "length"


def test_a_prompt_may_fill_all_but_one_place():
    harness = Harness(num_blocks=2, max_model_len=8)
    harness.add("a", [1] * 7, ignore_eos=True)
    harness.run()
    assert len(harness.received["a", 0].token_ids) == 1


@pytest.mark.parametrize(
    ("param", "message", "prompt", "params"),
    [
        ("prompt", "empty", [], {}),
        ("prompt", "prompt has 8 tokens.* the limit is 8", [1] * 8, {}),
        ("n", "5, more than max_num_seqs = 4", [1], {"n": 5}),
        ("n", "6, more than max_num_seqs = 4", [1], {"n": 2, "best_of": 6}),
        ("request_id", "'live' is in use", [1], {"request_id": "live"}),
    ],
)
def test_a_request_that_can_never_run_is_refused_by_the_field_to_blame(param, message, prompt, params):
    harness = Harness(max_model_len=8)
    harness.add("live", [1])
    with pytest.raises(InvalidRequestError, match=message) as refusal:
        harness.add(params.pop("request_id", "new"), prompt, **params)
    assert refusal.value.param == param
    harness.run()
    harness.check_empty()


def test_the_log_tells_what_happened_and_why(caplog):
    harness = Harness(num_blocks=4, num_host_blocks=4, preemption="swap", budget=8, log_schedule=True)
    caplog.set_level("INFO", "cupy_engine.schedule")
    harness.add("a", [1] * 10, **endless(6))
    harness.add("b", [2, 3, 4], **endless(3))
    harness.run()
    assert [record.message for record in caplog.records] == [
        "step 0: 8 tokens, 0 decodes, 1 chunks, 1 waiting, 2/4 blocks free; "
        "admit a.0 (0 of 10 tokens cached); compute a.0[0:8] of 10",
        "step 1: 5 tokens, 0 decodes, 2 chunks, 0 waiting, 0/4 blocks free; "
        "compute a.0[8:10] of 10; admit b.0 (0 of 3 tokens cached); compute b.0[0:3] of 3",
        "step 2: 2 tokens, 2 decodes, 0 chunks, 0 waiting, 0/4 blocks free",
        "step 3: 1 tokens, 1 decodes, 0 chunks, 1 waiting, 1/4 blocks free; "
        "preempt b.0 by swap (1 blocks, 4 tokens): no free block",
        "step 4: 1 tokens, 1 decodes, 0 chunks, 1 waiting, 0/4 blocks free",
        "step 5: 1 tokens, 1 decodes, 0 chunks, 1 waiting, 0/4 blocks free",
        "step 6: 1 tokens, 1 decodes, 0 chunks, 1 waiting, 0/4 blocks free",
        "step 7: 1 tokens, 1 decodes, 0 chunks, 0 waiting, 2/4 blocks free; swap in b.0 (1 blocks)",
    ]


def test_eos_and_stop_tokens_end_a_sequence_and_say_which():
    harness = Harness()
    for seed in range(40):
        harness.add(f"eos {seed}", [1], seed=seed, max_tokens=30)
        harness.add(f"stop {seed}", [1], seed=seed, max_tokens=30, stop_token_ids=[3], ignore_eos=True)
    harness.run()
    harness.check_outputs()
    ends = {
        (received.finish_reason, received.stop_reason, received.token_ids[-1]) for received in harness.received.values()
    }
    assert {("stop", None, EOS), ("stop", 3, 3)} <= ends
    assert not {end for end in ends if end[0] == "stop"} - {("stop", None, EOS), ("stop", 3, 3)}
