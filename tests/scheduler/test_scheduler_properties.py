"""Random traces: whoever comes, goes, fails or makes room, everybody gets the tokens they would get alone."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_harness import Harness

from cupy_engine.request_queue import FcfsPolicy, PriorityPolicy

POLICIES = st.sampled_from([FcfsPolicy(), PriorityPolicy(ageing_s=3.0), PriorityPolicy(ageing_s=1000.0)])


@st.composite
def harnesses(draw):
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    num_blocks = draw(st.integers(3, 14))
    max_num_seqs = draw(st.integers(1, 6))
    return Harness(
        num_blocks=num_blocks,
        block_size=block_size,
        num_host_blocks=draw(st.sampled_from([0, 3, 30])),
        preemption=draw(st.sampled_from(["recompute", "swap", "auto"])),
        max_num_seqs=max_num_seqs,
        budget=draw(st.integers(1, 20)),
        mixed_budget=draw(st.none() | st.integers(1, 20)),
        max_model_len=draw(st.integers(3, num_blocks * block_size)),
        policy=draw(POLICIES),
        steps_in_flight=draw(st.integers(1, 3)),
        enable_prefix_caching=draw(st.booleans()),
        foresees_growth=draw(st.booleans()),
    )


def add_random_request(draw, harness, number):
    """A prompt over two tokens, so that prefixes are often shared; ends are random through the drawn tokens."""
    longest = harness.max_model_len - 1
    max_tokens = draw(st.none() | st.integers(1, 12))
    harness.add(
        f"r{number}",
        draw(st.lists(st.integers(1, 2), min_size=1, max_size=min(longest, 20))),
        n=draw(st.integers(1, min(3, harness.max_num_seqs))),
        seed=draw(st.integers(0, 3)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, 2)) if max_tokens is None else 0,
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([[], [3], [3, 4]])),
        priority=draw(st.integers(0, 3)),
        salt=draw(st.sampled_from(["", "alice"])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
    )


def play(draw, harness, num_moves, faults=False):
    moves = ["add", "add", "step", "step", "step", "step", "abort", "abort one"]
    moves += ["break step", "break draw"] if faults else []
    for number in range(num_moves):
        move = draw(st.sampled_from(moves))
        live = sorted(harness.live_sequences())
        next_step_id = harness.scheduler._next_step_id
        if move == "add":
            add_random_request(draw, harness, number)
        elif move == "step":
            harness.step()
        elif move == "break step":
            harness.worker.broken_steps.add(next_step_id)
        elif move == "break draw":
            harness.worker.failing_draws.add((next_step_id, draw(st.integers(0, 2))))
        elif live:
            request_id, index = draw(st.sampled_from(live))
            harness.abort(request_id, None if move == "abort" else index)
    harness.run()
    harness.check_outputs()
    harness.check_empty()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), harnesses())
def test_everybody_gets_the_tokens_they_would_get_alone(data, harness):
    play(data.draw, harness, data.draw(st.integers(1, 60), "moves"))
    assert not harness.errors


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), harnesses())
def test_a_broken_step_fails_requests_but_never_gives_a_wrong_token(data, harness):
    play(data.draw, harness, data.draw(st.integers(1, 60), "moves"), faults=True)
