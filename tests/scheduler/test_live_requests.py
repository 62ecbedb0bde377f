"""Who is late, and that nothing is kept of those who are gone."""

from __future__ import annotations

from cupy_engine.live_requests import SPARE_DEADLINES, LiveRequests
from cupy_engine.messages import GenerateRequest
from cupy_engine.request_queue import DeadlineQueue
from cupy_engine.sampling_params import SamplingParams


def request(name: str, deadline_s: float) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams(), deadline_s=deadline_s)


def test_a_sweep_keeps_the_order() -> None:
    queue = DeadlineQueue()
    for number in (5, 1, 4, 2, 3):
        queue.push(float(number), str(number))
    queue.sweep({"1", "4", "5"})
    assert queue.pop_passed(4.5) == ["1", "4"]
    assert len(queue) == 1


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    live = LiveRequests(max_num_seqs=1, max_model_len=8)
    last = live.add(request("late", 5.0))
    for number in range(3 * SPARE_DEADLINES):
        live.remove(live.add(request(str(number), 600.0)))
    assert len(live._deadlines) <= SPARE_DEADLINES + 4
    assert live.late(10.0) == [last]
