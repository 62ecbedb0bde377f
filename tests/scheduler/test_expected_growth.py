"""Who is kept out until there will be room for all to grow, and who is not. Blocks of 4 tokens."""

from __future__ import annotations

import pytest
from scheduler_harness import Harness, endless, spans

from cupy_engine.expected_growth import ExpectedGrowth
from cupy_engine.scheduler_listener import SchedulerListener

PROMPT = [1, 2, 3, 4, 5]  # two blocks


class Preemptions(SchedulerListener):
    def __init__(self) -> None:
        self.count = 0

    def on_preempted(self, how: str) -> None:
        self.count += 1


def run(num_requests: int, num_tokens: int, *, foresees_growth: bool, num_blocks: int = 20) -> tuple[Harness, int]:
    listener = Preemptions()
    options = {"max_num_seqs": 8, "budget": 64, "enable_prefix_caching": False, "listener": listener}
    harness = Harness(num_blocks=num_blocks, foresees_growth=foresees_growth, **options)
    for i in range(num_requests):
        harness.add(str(i), [i + 1] * 5, **endless(num_tokens))
    harness.run()
    harness.check_outputs()
    harness.check_empty()
    return harness, listener.count


def test_nobody_has_to_make_room_where_ends_are_known() -> None:
    """Eight prompts fit into 20 blocks, but only four of them with the 16 tokens that they may generate."""
    assert run(8, 16, foresees_growth=False)[1] > 0
    assert run(8, 16, foresees_growth=True)[1] == 0


def test_the_last_end_leaves_room_for_the_next() -> None:
    """5 blocks are for one at its end, 3 of 8 are left: two more could start, and one of them can end beside it."""
    harness = Harness(num_blocks=8, max_num_seqs=4, budget=64, foresees_growth=True, enable_prefix_caching=False)
    for name in "abc":
        harness.add(name, PROMPT, **endless(14))
    assert spans(harness.step()) == [(0, 0, 5)]
    for _ in range(13):
        assert harness.scheduler.num_running == 1
        harness.step()
    assert harness.scheduler.num_running == 0  # a has ended
    harness.run()
    harness.check_outputs()


def test_those_that_end_soon_make_room_for_newcomers_to_grow() -> None:
    """a is about to end, so b may come in although not both of them could grow to b's length."""
    harness = Harness(num_blocks=7, max_num_seqs=4, budget=64, foresees_growth=True, enable_prefix_caching=False)
    harness.add("a", [1] * 16, **endless(2))
    harness.add("b", [2] * 4, **endless(20))
    assert spans(harness.step()) == [(0, 0, 16), (1, 0, 4)]
    harness.run()
    harness.check_outputs()


@pytest.mark.parametrize("foresees_growth", [False, True])
def test_one_comes_in_however_much_it_may_generate(foresees_growth: bool) -> None:
    harness, _ = run(2, 75, foresees_growth=foresees_growth)
    assert len(harness.received["1", 0].token_ids) == 75


def test_shared_blocks_are_not_needed_twice() -> None:
    """Six continuations of one prompt of 40 tokens, which alone fills 10 of 16 blocks."""
    harness = Harness(num_blocks=16, max_num_seqs=8, budget=64, foresees_growth=True)
    harness.add("first", list(range(1, 41)), **endless(1))
    harness.run()
    for i in range(4):
        harness.add(str(i), [*range(1, 41), i + 50], **endless(3))
    harness.step()
    assert harness.scheduler.num_running == 4
    harness.run()
    harness.check_outputs()


def test_what_others_generated_lately_is_expected() -> None:
    harness = Harness(num_blocks=64, max_num_seqs=8, budget=64, foresees_growth=True)
    growth = harness.scheduler._planner._growth
    assert isinstance(growth, ExpectedGrowth)
    for i in range(100):
        harness.add(str(i), PROMPT, **endless(3))
    harness.run()
    assert 3 <= growth._num_output_tokens < 10
    harness.add("aborted", PROMPT, **endless(100))
    harness.step()
    harness.abort("aborted")
    assert 3 <= growth._num_output_tokens < 10
