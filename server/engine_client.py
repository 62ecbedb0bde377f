"""A worker's end of the wire: any number of request threads talk to the engine through one I/O thread.

request threads ── submit, abort ──▶ outbox ──▶ I/O thread ══ engine.sock ══▶ engine process
request threads ◀── one mailbox per HTTP request ◀─┘
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from cupy_engine.errors import EngineDeadError, QueueFullError
from cupy_engine.messages import (
    AbortRequest,
    Command,
    GenerateRequest,
    RefusalReport,
    SequenceOutput,
    StatsReply,
    StatsRequest,
)
from cupy_engine.overload import AdmissionRule, EngineLoad

from .engine_connection import EngineConnection
from .heard_load import HeardLoad
from .mailbox import Mailbox
from .request_ids import RequestIds
from .wire import Delivery, EngineStatus

logger = logging.getLogger(__name__)

HealthState = Literal[
    "starting", "loading", "ready", "stopping", "stalled", "unresponsive", "restarting", "dead", "failed"
]

STATS_TIMEOUT_S = 5.0
NEWS_TIMEOUT_S = 0.5
_SENTENCES: dict[HealthState, str] = {
    "starting": "the engine is starting; try again in a moment",
    "loading": "the engine is loading the model; try again in a moment",
    "stopping": "the server is shutting down",
    "stalled": "the engine makes no progress",
    "unresponsive": "the engine does not answer",
    "restarting": "the engine is restarting; try again in a moment",
    "dead": "the engine process has ended",
    "failed": "the engine has failed too often and stays down; the server's log has the details",
}


class EngineLostError(EngineDeadError):
    """The engine process ended before it had answered these requests."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        super().__init__("the engine process has ended while it computed this request")
        self.request_ids = request_ids


def require_ready(state: HealthState) -> None:
    """Raises EngineDeadError unless ``state`` is ready."""
    if state != "ready":
        raise EngineDeadError(_SENTENCES[state])


class EngineClient:
    """Talks to the engine process of this server. Made before a fork if need be: it connects at first use.

    Args:
        folder: where the engine's sockets are.
        stall_timeout_s: the engine counts as stalled when its loop has not come round for this long.
        rule: whom the engine's queue takes; what it would refuse is refused here, without waiting for its next step.
        ids: shared by the clients of all engines that a request may go to.

    ``on_ready``: callables that get the engine's status, on the I/O thread, each time an engine becomes ready.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stall_timeout_s: float = 60.0,
        rule: AdmissionRule | None = None,
        ids: RequestIds | None = None,
    ) -> None:
        self._folder = folder
        self._rule = rule
        self._ids = ids or RequestIds()
        self._stall_timeout_s = stall_timeout_s
        self.on_ready: list[Callable[[EngineStatus], None]] = []
        self._lock = threading.Lock()
        self._pid: int | None = None

    def connect(self) -> None:
        """Start the I/O thread, if this process has not yet."""
        with self._lock:
            if self._pid == os.getpid():
                return
            self._mailboxes: dict[str, Mailbox] = {}
            self._stats_boxes: dict[int, queue.SimpleQueue[StatsReply | None]] = {}  # None: the engine is lost
            self._was_ready = False
            self._load = HeardLoad()
            self._refusals: Counter[str] = Counter()  # not yet reported
            self.num_submitted = 0
            self._connection = EngineConnection(
                self._folder, self._ids.client_id, self, stall_timeout_s=self._stall_timeout_s
            )
            self._connection.start()
            self._pid = os.getpid()

    def close(self) -> None:
        if self._pid == os.getpid():
            self._connection.close()
            self._pid = None

    def retire(self) -> None:
        """Close when the engine has ended, which it will when it has answered all requests."""
        self.connect()
        self._connection.retire()

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

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests, as far as is known without waiting."""
        self.connect()
        link = self._connection
        status = None if link.is_lost or link.is_silent else link.status
        return status is not None and status.state == "ready" and status.turn_age_s <= self._stall_timeout_s

    @property
    def num_live_requests(self) -> int:
        """How many requests the engine is busy with: those of this worker now, or of all workers a moment ago."""
        load = self.load
        return max(len(self._mailboxes), load.num_running + load.num_waiting)

    def require_ready(self) -> None:
        """Raises EngineDeadError unless the engine takes requests."""
        require_ready(self.state)

    def new_request_id(self) -> str:
        return self._ids.new_request_id()

    def submit(self, requests: Sequence[GenerateRequest], mailbox: Mailbox | None = None) -> Mailbox:
        """Send requests; their outputs, or an EngineLostError, arrive in the mailbox, which is returned.

        Args:
            mailbox: of requests that have been accepted before.

        Raises:
            EngineDeadError: the engine does not take requests now.
            QueueFullError: it has too many already.
        """
        self.require_ready()
        if mailbox is None:
            self.check_load(len(requests))
            mailbox = Mailbox()
        life = self._connection.life
        self._mailboxes.update((request.request_id, mailbox) for request in requests)
        self.num_submitted += len(requests)
        self._load.sent(request.request_id for request in requests)
        self._connection.send(requests, life)
        if self._connection.life != life:  # it ended in between, perhaps after all mailboxes were told
            self._report_lost([request.request_id for request in requests])
        return mailbox

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is, as far as this worker can tell."""
        return self._load.now

    def refused(self, reason: str) -> None:
        """Count a request that was turned away on this side."""
        with self._lock:
            self._refusals[reason] += 1

    def check_load(self, num_requests: int) -> None:
        """Raises QueueFullError if the engine's queue would not take so many more."""
        if self._rule is not None:
            try:
                self._rule.check(self.load, num_requests)
            except QueueFullError as error:
                self.refused(error.reason)
                raise

    def send(self, commands: Sequence[Command]) -> None:
        self._connection.send(commands, self._connection.life)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop the mailboxes of requests that are over."""
        for request_id in request_ids:
            self._mailboxes.pop(request_id, None)
            self._load.forget(request_id)

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
        token = self._ids.new_stats_token()
        box = self._stats_boxes[token] = queue.SimpleQueue()
        try:
            self.send([StatsRequest(token=token, wants_live=wants_live)])
            if (reply := box.get(timeout=timeout_s)) is None:
                raise EngineDeadError(_SENTENCES["dead"])
            return reply
        except queue.Empty:
            raise EngineDeadError("the engine does not answer: it is busy with a long step, or stuck") from None
        finally:
            self._stats_boxes.pop(token, None)

    # For the I/O thread

    def on_delivery(self, delivery: Delivery) -> None:
        """Sort replies into mailboxes: one piece of mail per mailbox."""
        self._load.take_delivery(delivery)
        mail: dict[int, tuple[Mailbox, list[SequenceOutput]]] = {}
        lost: list[str] = []
        for reply in delivery.replies:
            if isinstance(reply, StatsReply):
                if box := self._stats_boxes.get(reply.token):
                    box.put(reply)
            elif reply.error_kind == "dead":  # the engine ends, and says so; one that is killed does not
                lost.append(reply.request_id)
            elif mailbox := self._mailboxes.get(reply.request_id):
                mail.setdefault(id(mailbox), (mailbox, []))[1].append(reply)
        for mailbox, outputs in mail.values():
            mailbox.put(outputs)
        if lost:
            self._connection.note_end()
            self._report_lost(lost)

    def on_status(self, status: EngineStatus) -> None:
        self._load.take_status(status, self._connection.heard_s)
        if self._refusals:
            with self._lock:
                refusals, self._refusals = self._refusals, Counter()
            self.send([RefusalReport(num_by_reason=dict(refusals))])
        is_ready = status.state == "ready"
        if is_ready and not self._was_ready:
            for call in self.on_ready:
                call(status)
        self._was_ready = is_ready

    def on_lost(self) -> None:
        """Tell everyone who waits."""
        self._load.lose()
        self._was_ready = False
        self._report_lost(list(self._mailboxes))
        for box in list(self._stats_boxes.values()):
            box.put(None)

    def _report_lost(self, request_ids: Sequence[str]) -> None:
        """One piece of mail per mailbox; each request is reported once."""
        lost: dict[Mailbox, list[str]] = defaultdict(list)
        for request_id in request_ids:
            self._load.forget(request_id)
            if mailbox := self._mailboxes.pop(request_id, None):
                lost[mailbox].append(request_id)
        for mailbox, ids in lost.items():
            mailbox.put(partial(EngineLostError, ids))
