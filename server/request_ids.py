"""Who this process is to engines, and the ids of its requests."""

from __future__ import annotations

import itertools
import os
import random
import threading

from . import wire


class RequestIds:
    """31 random bits, the same for all engines and drawn anew after a fork, and serial numbers.

    So an id stays good when its request goes to another engine.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None

    @property
    def client_id(self) -> int:
        with self._lock:
            if self._pid != os.getpid():
                self._client_id = random.SystemRandom().getrandbits(31)
                self._serials = itertools.count(1)
                self._pid = os.getpid()
            return self._client_id

    def new_request_id(self) -> str:
        return wire.request_id(self.client_id, next(self._serials))

    def new_stats_token(self) -> int:
        return wire.stats_token(self.client_id, next(self._serials))
