"""Sequences whose next token depends on a grammar: never ahead of their last token, never in the way of others."""

from __future__ import annotations

from scheduler_harness import Harness, endless, spans

from cupy_engine.guides import Guide, GuideError
from cupy_engine.plan import TokenMask
from cupy_engine.structured_outputs import Grammar

PROMPT = [5, 6, 7, 8, 9, 10]


class CountingMatcher:
    """Stands where a grammar's matcher would."""

    def deep_copy(self) -> CountingMatcher:
        return CountingMatcher()


def add_guided(harness: Harness, request_id: str, prompt: list[int], mask: bytes | None, **params: object) -> Guide:
    harness.add(request_id, prompt, **endless(**params))
    guide = Guide(request_id, Grammar("", "guided_regex"), [], CountingMatcher(), mask)
    harness.live_sequences()[request_id, 0].guide = guide
    return guide


def test_the_prompt_is_computed_but_for_its_last_token_while_the_grammar_compiles() -> None:
    harness = Harness()
    guide = add_guided(harness, "a", PROMPT, None)
    plan = harness.step()
    assert spans(plan) == [(0, 0, 5)]
    assert plan.sequences[0].sample_slots == []
    assert plan.masks == []
    assert harness.step() is None
    guide.mask = b"m0"
    plan = harness.step()
    assert spans(plan) == [(0, 5, 6)]
    assert (plan.sequences[0].sample_slots, plan.masks) == ([0], [TokenMask(0, b"m0")])
    assert plan.slot_setups == [], "it was seated before"


def test_a_prompt_of_one_token_takes_its_seat_and_waits() -> None:
    harness = Harness()
    guide = add_guided(harness, "a", [5], None)
    plan = harness.step()
    assert ([setup.is_guided for setup in plan.slot_setups], plan.sequences) == ([True], [])
    assert harness.step() is None
    guide.mask = b"m0"
    assert spans(harness.step()) == [(0, 0, 1)]


def test_others_run_ahead_of_a_guided_sequence_and_it_does_not() -> None:
    harness = Harness(steps_in_flight=2)
    guide = add_guided(harness, "a", PROMPT, b"m0")
    harness.add("b", [1, 2, 3], **endless())
    assert spans(harness.step()) == [(0, 0, 6), (1, 0, 3)]
    assert spans(harness.step()) == [(1, 3, 4)], "a's first token is not known yet"
    (move,) = guide.moves
    assert move == (guide, harness.received["a", 0].token_ids[0])
    assert guide.mask is None
    assert spans(harness.step()) == [(1, 4, 5)], "nor what it allows"
    guide.mask = b"m1"
    plan = harness.step()
    assert spans(plan) == [(0, 6, 7), (1, 5, 6)]
    assert plan.masks == [TokenMask(0, b"m1")]


def test_forks_draw_by_one_mask_and_go_on_with_guides_of_their_own() -> None:
    harness = Harness()
    guide = add_guided(harness, "a", PROMPT, b"m0", n=3)
    plan = harness.step()
    assert plan.masks == [TokenMask(slot, b"m0") for slot in (0, 1, 2)]
    guides = [harness.live_sequences()["a", index].guide for index in range(3)]
    assert guides[0] is guide
    assert len({id(each.matcher) for each in guides}) == 3
    assert [moved for moved, _ in guide.moves] == guides
    guides[1].mask = b"m1"
    plan = harness.step()
    assert (spans(plan), plan.masks) == ([(1, 6, 7)], [TokenMask(1, b"m1")])


def test_a_preempted_sequence_comes_back_to_its_mask() -> None:
    harness = Harness(num_blocks=3, block_size=4)
    harness.add("b", [1, 2, 3], **endless(max_tokens=5))
    guide = add_guided(harness, "a", [5, 6, 7], b"m0", max_tokens=5)
    for step in range(40):
        if guide.mask is None:
            guide.mask = b"m%d" % step
        if not harness.scheduler.has_work:
            break
        harness.step()
    assert len(guide.moves) == 4, "every token but the last, once"
    assert [token_id for _, token_id in guide.moves] == harness.received["a", 0].token_ids[:4]
    harness.check_outputs()
    harness.check_empty()


def test_a_bad_grammar_ends_its_request_only() -> None:
    harness = Harness()
    add_guided(harness, "a", PROMPT, None)
    harness.add("b", [1, 2, 3], **endless(max_tokens=3))
    harness.step()
    outputs = harness.scheduler.refuse(GuideError("a", "guided_regex", "guided_regex is refused: unclosed group"))
    harness.receive(outputs)
    error = harness.errors["a"]
    assert (error.error_kind, error.error_param) == ("invalid", "guided_regex")
    assert "unclosed group" in (error.error or "")
    assert harness.scheduler.refuse(GuideError("a", "guided_regex", "again")) == [], "it has ended"
    harness.run()
    harness.check_outputs()
    harness.check_empty()
