"""What a worker makes of what an engine says about its load."""

from __future__ import annotations

import time

from cupy_engine.server.heard_load import HeardLoad
from cupy_engine.server.wire import Delivery, EngineStatus

from cupy_engine.overload import EngineLoad

FULL = EngineLoad(num_running=4)


def status(num_free: int, turn_age_s: float = 0.0) -> EngineStatus:
    return EngineStatus(state="ready", turn_age_s=turn_age_s, load=EngineLoad(num_free=num_free))


def test_what_was_sent_counts_until_a_delivery_names_it() -> None:
    heard = HeardLoad()
    heard.take_status(status(num_free=2), time.monotonic())
    heard.sent(["a", "b", "c"])
    assert (heard.now.num_free, heard.now.num_waiting) == (0, 1)
    heard.take_delivery(Delivery([], ["a", "x"], FULL))
    assert heard.now.num_waiting == 2
    heard.take_delivery(Delivery([], ["b", "c"], FULL))
    assert heard.now == FULL


def test_what_was_sent_counts_until_a_status_of_a_later_turn() -> None:
    heard = HeardLoad()
    heard.sent(["a"])
    now_s = time.monotonic()
    heard.take_status(status(num_free=3, turn_age_s=5.0), now_s)
    assert heard.now.num_free == 2
    heard.take_status(status(num_free=3, turn_age_s=0.2), now_s + 1.0)
    assert heard.now.num_free == 3


def test_a_status_does_not_undo_a_delivery() -> None:
    heard = HeardLoad()
    heard.take_delivery(Delivery([], [], FULL))
    heard.take_status(status(num_free=9), time.monotonic())
    assert heard.now == FULL
    heard.take_status(status(num_free=9), time.monotonic() + 0.1)
    assert heard.now.num_free == 9, "another worker's requests may have ended meanwhile"


def test_nothing_is_known_of_an_engine_that_has_ended() -> None:
    heard = HeardLoad()
    heard.take_delivery(Delivery([], [], FULL))
    heard.sent(["a"])
    heard.lose()
    heard.forget("a")
    assert heard.now == EngineLoad()
