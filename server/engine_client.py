"""A worker's end of the wire: any number of request threads talk to the engine through one I/O thread.

request threads ── submit, abort ──▶ outbox ──▶ I/O thread ══ engine.sock ══▶ engine process
request threads ◀── one mailbox per HTTP request ◀─┘
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cupy_engine.errors import EngineDeadError, QueueFullError
from cupy_engine.messages import (
    AbortRequest,
    Command,
    GenerateRequest,
    RefusalReport,
    Reply,
    SequenceOutput,
    StatsReply,
    StatsRequest,
)
from cupy_engine.overload import AdmissionRule, EngineLoad

from . import wire
from .engine_connection import EngineConnection
from .mailbox import Mailbox
from .wire import EngineStatus

logger = logging.getLogger(__name__)

HealthState = Literal["starting", "loading", "ready", "stopping", "stalled", "unresponsive", "dead"]

STATS_TIMEOUT_S = 5.0
NEWS_TIMEOUT_S = 0.5
_SENTENCES: dict[HealthState, str] = {
    "starting": "the engine is starting; try again in a moment",
    "loading": "the engine is loading the model; try again in a moment",
    "stopping": "the server is shutting down",
    "stalled": "the engine makes no progress",
    "unresponsive": "the engine does not answer",
    "dead": "the engine process has ended",
}


class EngineClient:
    """Talks to the engine process of this server. Made before a fork if need be: it connects at first use.

    Args:
        folder: where the engine's sockets are.
        stall_timeout_s: the engine counts as stalled when its loop has not come round for this long.
        rule: whom the engine's queue takes; what it would refuse is refused here, without waiting for its next step.

    ``on_ready``: callables that get the engine's status, on the I/O thread, each time an engine becomes ready.
    """

    def __init__(self, folder: Path, *, stall_timeout_s: float = 60.0, rule: AdmissionRule | None = None) -> None:
        self._folder = folder
        self._rule = rule
        self._stall_timeout_s = stall_timeout_s
        self.on_ready: list[Callable[[EngineStatus], None]] = []
        self._lock = threading.Lock()
        self._pid: int | None = None

    def connect(self) -> None:
        """Start the I/O thread, if this process has not yet."""
        with self._lock:
            if self._pid == os.getpid():
                return
            self._client_id = random.SystemRandom().getrandbits(31)
            self._serials = itertools.count(1)
            self._mailboxes: dict[str, Mailbox] = {}
            self._stats_boxes: dict[int, queue.SimpleQueue[StatsReply]] = {}
            self._was_ready = False
            self._num_new = 0  # requests submitted since the engine's latest status
            self._refusals: Counter[str] = Counter()  # not yet reported
            self._connection = EngineConnection(self._folder, self._client_id, self)
            self._connection.start()
            self._pid = os.getpid()

    def close(self) -> None:
        if self._pid == os.getpid():
            self._connection.close()
            self._pid = None

    # For request threads

    @property
    def state(self) -> HealthState:
        """How the engine is doing, from its latest answer and how old that is."""
        self.connect()
        link = self._connection
        if not link.is_lost and (link.status is None or link.status.state == "loading"):
            link.await_news(NEWS_TIMEOUT_S)  # what we know may be old: another worker may have called it ready
        if link.is_lost:
            return "dead"
        if link.status is None:
            return "starting"
        if link.is_silent:
            return "unresponsive"
        if link.status.state == "ready" and link.status.turn_age_s > self._stall_timeout_s:
            return "stalled"
        return link.status.state

    def require_ready(self) -> None:
        """Raises EngineDeadError unless the engine takes requests."""
        state = self.state
        if state != "ready":
            raise EngineDeadError(_SENTENCES[state])

    def new_request_id(self) -> str:
        self.connect()
        return wire.request_id(self._client_id, next(self._serials))

    def submit(self, requests: Sequence[GenerateRequest]) -> Mailbox:
        """Send requests; their outputs, or the exception that ends them all, arrive in the returned mailbox.

        Raises:
            EngineDeadError: the engine does not take requests now.
            QueueFullError: it has too many already.
        """
        self.require_ready()
        self._check_load(len(requests))
        mailbox = Mailbox()
        self._mailboxes.update((request.request_id, mailbox) for request in requests)
        self.send(requests)
        if self.state == "dead":  # it died between the check and here, perhaps after failing all mailboxes
            mailbox.put(EngineDeadError(_SENTENCES["dead"]))
        return mailbox

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is, as far as this worker can tell: its latest word, and what should have come since."""
        link = self._connection
        if link.status is None:
            return EngineLoad()
        return link.status.load.later(time.monotonic() - link.heard_s, self._num_new)

    def refused(self, reason: str) -> None:
        """Count a request that was turned away on this side."""
        with self._lock:
            self._refusals[reason] += 1

    def _check_load(self, num_requests: int) -> None:
        if self._rule is not None:
            try:
                self._rule.check(self.load, num_requests)
            except QueueFullError as error:
                self.refused(error.reason)
                raise
        self._num_new += num_requests

    def send(self, commands: Sequence[Command]) -> None:
        self._connection.send(commands)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop the mailboxes of requests that are over."""
        for request_id in request_ids:
            self._mailboxes.pop(request_id, None)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests whose client has gone; nothing more arrives for them."""
        self.forget(request_ids)
        self.send([AbortRequest(request_id=request_id) for request_id in request_ids])

    @property
    def status(self) -> EngineStatus | None:
        """The engine's latest answer, if there was one."""
        self.connect()
        return self._connection.status

    def stats(self, timeout_s: float = STATS_TIMEOUT_S, *, wants_live: bool = False) -> StatsReply:
        """Counters and metrics, and with ``wants_live`` a picture of the moment.

        Raises:
            EngineDeadError: the engine does not answer in time.
        """
        self.require_ready()
        token = wire.stats_token(self._client_id, next(self._serials))
        box = self._stats_boxes[token] = queue.SimpleQueue()
        try:
            self.send([StatsRequest(token=token, wants_live=wants_live)])
            return box.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineDeadError("the engine does not answer: it is busy with a long step, or stuck") from None
        finally:
            self._stats_boxes.pop(token, None)

    # For the I/O thread

    def on_replies(self, replies: list[Reply]) -> None:
        """Sort replies into mailboxes: one piece of mail per mailbox."""
        mail: dict[int, tuple[Mailbox, list[SequenceOutput]]] = {}
        for reply in replies:
            if isinstance(reply, StatsReply):
                if box := self._stats_boxes.get(reply.token):
                    box.put(reply)
            elif mailbox := self._mailboxes.get(reply.request_id):
                mail.setdefault(id(mailbox), (mailbox, []))[1].append(reply)
        for mailbox, outputs in mail.values():
            mailbox.put(outputs)

    def on_status(self, status: EngineStatus) -> None:
        self._num_new = 0
        if self._refusals:
            with self._lock:
                refusals, self._refusals = self._refusals, Counter()
            self.send([RefusalReport(num_by_reason=dict(refusals))])
        is_ready = status.state == "ready"
        if is_ready and not self._was_ready:
            for call in self.on_ready:
                call(status)
        self._was_ready = is_ready

    def on_lost(self, state: HealthState) -> None:
        """Fail everyone who waits."""
        for request_id, mailbox in self._mailboxes.copy().items():
            self._mailboxes.pop(request_id, None)
            mailbox.put(EngineDeadError(_SENTENCES[state]))
