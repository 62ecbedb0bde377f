"""How busy an engine is, as one of its workers hears."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cupy_engine.overload import EngineLoad

from .wire import Delivery, EngineStatus

_FRESH_S = 0.05  # a status that comes sooner after a delivery may be older than that


class HeardLoad:
    """The engine's latest word about its load, and this worker's requests that it leaves out.

    A delivery comes after each step that has something for this worker; else a status says how things are, now and
    then. Known only from statuses, seats that have become free would stay empty until the next one, and then be taken
    all at once.
    """

    def __init__(self) -> None:
        self._word = (EngineLoad(), 0.0)  # and when it came
        self._unread: dict[str, float] = {}  # when requests were sent

    @property
    def now(self) -> EngineLoad:
        """The word, and what should have come since."""
        load, heard_s = self._word
        return load.later(time.monotonic() - heard_s, len(self._unread))

    def sent(self, request_ids: Iterable[str]) -> None:
        self._unread.update(dict.fromkeys(request_ids, time.monotonic()))

    def forget(self, request_id: str) -> None:
        """It is over."""
        self._unread.pop(request_id, None)

    def take_delivery(self, delivery: Delivery) -> None:
        self._word = (delivery.load, time.monotonic())
        for request_id in delivery.read:
            self.forget(request_id)

    def take_status(self, status: EngineStatus, heard_s: float) -> None:
        """``heard_s``: when it came."""
        if heard_s - self._word[1] < _FRESH_S:
            return
        self._word = (status.load, heard_s)
        for request_id, sent_s in list(self._unread.items()):
            if sent_s < heard_s - status.turn_age_s:
                self.forget(request_id)

    def lose(self) -> None:
        """The engine has ended."""
        self._word = (EngineLoad(), 0.0)
