"""Blocks that several sequences share: cached prefixes, and the n continuations of one prompt. Blocks of 4 tokens."""

from scheduler_harness import Harness, endless, ref_counts, spans

from cupy_engine.plan import BlockTableWrite, ScheduledSequence

# Prefix cache


def test_a_request_starts_after_its_cached_prefix():
    harness = Harness()
    harness.add("a", [*range(1, 10)], **endless(1))
    harness.run()
    harness.add("b", [*range(1, 9), 77, 78], **endless(1))
    plan = harness.step()
    assert plan.sequences == [ScheduledSequence(slot=0, start=8, num_tokens=2, token_ids=[77, 78], sample_slots=[0])]
    assert plan.block_table_writes == [BlockTableWrite(0, 0, [0, 1]), BlockTableWrite(0, 2, [3])]
    assert harness.received["a", 0].num_cached_tokens == 0
    assert harness.received["b", 0].num_cached_tokens == 8
    harness.check_outputs()


def test_of_a_prompt_that_is_cached_whole_the_last_block_is_computed_for_its_logits():
    harness = Harness()
    for name in "ab":
        harness.add(name, [*range(1, 9)], **endless(1))
        plan = harness.step()
    assert spans(plan) == [(0, 4, 8)]
    harness.check_outputs()


def test_requests_of_one_step_share_what_the_step_itself_computes():
    harness = Harness()
    for name in "ab":
        harness.add(name, [*range(1, 7)], **endless(2))
    plan = harness.step()
    assert spans(plan) == [(0, 0, 6), (1, 4, 6)]
    assert ref_counts(harness)[:3] == [2, 1, 1]
    harness.run()
    harness.check_outputs()


def test_the_next_turn_of_a_conversation_finds_the_answer_too():
    harness = Harness()
    harness.add("turn 1", [1, 2, 3], **endless(7))
    harness.run()
    answer = harness.received["turn 1", 0].token_ids
    harness.add("turn 2", [1, 2, 3, *answer, 4, 5], **endless(1))
    harness.run()
    assert harness.received["turn 2", 0].num_cached_tokens == 8  # two blocks of the 9 computed tokens
    harness.check_outputs()


def test_a_block_is_findable_as_soon_as_a_decode_has_filled_it():
    harness = Harness()
    harness.add("turn 1", [1, 2, 3], **endless(6))
    harness.run()
    answer = harness.received["turn 1", 0].token_ids
    harness.add("turn 2", [1, 2, 3, *answer], **endless(1))
    harness.run()
    assert harness.received["turn 2", 0].num_cached_tokens == 8  # all that was computed


def test_another_salt_shares_nothing_and_its_own_salt_does():
    harness = Harness()
    for name, salt in (("a", "alice"), ("b", "bob"), ("c", ""), ("d", "alice")):
        harness.add(name, [*range(1, 10)], salt=salt, **endless(1))
        harness.run()
    cached = {key[0]: received.num_cached_tokens for key, received in harness.received.items()}
    assert cached == {"a": 0, "b": 0, "c": 0, "d": 8}


def test_prompt_logprobs_need_every_position_computed():
    harness = Harness(budget=5)
    harness.add("a", [*range(1, 10)], **endless(1))
    harness.run()
    harness.add("b", [*range(1, 10)], prompt_logprobs=2, **endless(3))
    plans = harness.run()
    assert [entry.num_prompt_logprobs for plan in plans for entry in plan.sequences] == [2, 2, None, None]
    assert harness.received["b", 0].num_cached_tokens == 0
    assert len(harness.received["b", 0].prompt_logprobs) == 9
    harness.check_outputs()


def test_without_prefix_caching_everything_is_computed():
    harness = Harness(enable_prefix_caching=False)
    for name in "ab":
        harness.add(name, [*range(1, 10)], **endless(1))
        plan = harness.step()
    assert spans(plan) == [(0, 0, 9)]


# Forks


def test_n_sequences_fork_at_the_end_of_the_prompt():
    harness = Harness()
    harness.add("a", [1, 2, 3, 4, 5, 6], n=3, seed=9, **endless(4))

    prompt = harness.step()
    assert [(setup.slot, len(setup.token_ids)) for setup in prompt.slot_setups] == [(0, 6), (1, 6), (2, 6)]
    assert prompt.slot_setups[0].seed == 9
    assert len({setup.seed for setup in prompt.slot_setups}) == 3
    assert prompt.sequences == [
        ScheduledSequence(slot=0, start=0, num_tokens=6, token_ids=[1, 2, 3, 4, 5, 6], sample_slots=[0, 1, 2])
    ]
    assert prompt.block_table_writes == [BlockTableWrite(slot, 0, [0, 1]) for slot in (0, 1, 2)]
    assert ref_counts(harness)[:2] == [3, 3]

    first_decode = harness.step()
    assert spans(first_decode) == [(0, 6, 7), (1, 6, 7), (2, 6, 7)]
    assert first_decode.block_copies == [(1, 2), (1, 3)]  # the last of the three keeps the block
    assert first_decode.block_table_writes == [BlockTableWrite(0, 1, [2]), BlockTableWrite(1, 1, [3])]
    assert ref_counts(harness)[:4] == [3, 1, 1, 1]

    harness.run()
    tokens = [harness.received["a", index].token_ids for index in range(3)]
    assert len({tuple(token_ids) for token_ids in tokens}) > 1
    harness.check_outputs()
    harness.check_empty()


def test_the_seats_of_all_n_are_taken_with_the_first_chunk():
    """Otherwise the end of the prompt could find no seat to fork into."""
    harness = Harness(budget=4, max_num_seqs=3)
    harness.add("a", [1, 2, 3, 4, 5, 6], n=2, **endless(2))
    harness.add("b", [7], n=2, **endless(1))
    assert [spans(harness.step()) for _ in range(3)] == [[(0, 0, 4)], [(0, 4, 6)], [(0, 6, 7), (1, 6, 7)]]
    assert harness.scheduler.num_waiting == 1
    harness.run()
    harness.check_outputs()


def test_one_of_n_may_end_before_the_others():
    harness = Harness(max_num_seqs=8)
    harness.add("a", [1, 2, 3], n=8, max_tokens=20, seed=1)
    harness.run()
    lengths = {len(harness.received["a", index].token_ids) for index in range(8)}
    assert len(lengths) > 1
    harness.check_outputs()
    harness.check_empty()


def test_best_of_runs_more_sequences_than_are_returned_and_asks_for_their_logprobs():
    harness = Harness()
    harness.add("a", [1, 2], n=1, best_of=3, **endless(2))
    plan = harness.step()
    assert plan.sequences[0].sample_slots == [0, 1, 2]
    assert all(setup.needs_logprobs for setup in plan.slot_setups)


def test_a_seed_alone_decides_the_seeds_of_the_n():
    seeds = []
    for neighbours in (0, 2):
        harness = Harness(max_num_seqs=8)
        for i in range(neighbours):
            harness.add(f"neighbour {i}", [1], **endless(5))
            harness.step()
        harness.add("a", [1, 2], n=3, seed=42, **endless(5))
        plan = harness.step()
        seeds.append([setup.seed for setup in plan.slot_setups])
    assert seeds[0] == seeds[1]
