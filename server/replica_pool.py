"""The replicas of one deployment, as one engine to those who submit requests.

A request goes where the least work is expected: the prompt tokens that the replica has not seen yet, and
``REQUEST_COST_TOKENS`` for each request it is busy with. What a lost replica has not answered goes to another one, or
waits for its successor.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupy_engine.errors import EngineDeadError
from cupy_engine.messages import AbortRequest, GenerateRequest

from .deployment import ReplicaStatus
from .engine_client import EngineClient, HealthState, require_ready
from .mailbox import Mailbox
from .prefix_index import PrefixIndex
from .request_ids import RequestIds
from .wire import EngineStatus

logger = logging.getLogger(__name__)

REQUEST_COST_TOKENS = 64
_BEST_FIRST: tuple[HealthState, ...] = (
    "ready",
    "stalled",
    "unresponsive",
    "stopping",
    "loading",
    "starting",
    "restarting",
    "dead",
    "failed",
)


@dataclass(slots=True)
class PooledReplica:
    """A replica as a worker sees it: its own line to it, and what the supervisor says."""

    name: str
    client: EngineClient
    status: ReplicaStatus

    @property
    def engine(self) -> int:
        """The process id of the engine that is there now; 0 if there is none yet."""
        status = self.client.status
        return 0 if status is None else status.pid

    @property
    def state(self) -> HealthState:
        if self.status.state == "failed":
            return "failed"
        state = self.client.state
        return "restarting" if state == "dead" else state


class ReplicaPool:
    """Made before a fork if need be. Any thread may submit; :meth:`update` says which replicas there are.

    ``on_ready``: callables that get a replica's status each time it becomes ready, on its client's I/O thread.
    """

    def __init__(self, make_client: Callable[[Path], EngineClient], ids: RequestIds) -> None:
        self._make_client = make_client
        self._ids = ids
        self._lock = threading.Lock()
        self._places: dict[str, EngineClient] = {}
        self._parked: list[tuple[list[GenerateRequest], Mailbox]] = []
        self._seen: PrefixIndex | None = None  # until there is a choice
        self.on_ready: list[Callable[[EngineStatus], None]] = []
        self.replicas: dict[str, PooledReplica] = {}

    def update(self, statuses: Sequence[ReplicaStatus]) -> None:
        """Take up new replicas, send nothing more to those that are missing. One thread calls this."""
        known = self.replicas
        if self._seen is None and len(statuses) > 1:
            self._seen = _open_index(Path(statuses[0].folder).parent)
        self.replicas = {status.folder: self._pooled(status, known.get(status.folder)) for status in statuses}
        for folder in known.keys() - self.replicas.keys():
            known[folder].client.retire()
        if not self._has_hope():
            self._serve_parked()

    # For request threads

    @property
    def state(self) -> HealthState:
        """That of the replica which is best off."""
        states = {replica.state for replica in self.replicas.values()}
        return next((state for state in _BEST_FIRST if state in states), "starting")

    def new_request_id(self) -> str:
        return self._ids.new_request_id()

    def submit(self, requests: Sequence[GenerateRequest]) -> Mailbox:
        """Send requests; their outputs, or EngineLostErrors, arrive in the returned mailbox.

        Raises:
            EngineDeadError: no replica takes requests now.
            QueueFullError: all of them have too many already.
        """
        if not self._ready():
            require_ready(self.state)
        self._check_load(len(requests))
        mailbox = Mailbox()
        self.resubmit(requests, mailbox)
        return mailbox

    def resubmit(self, requests: Sequence[GenerateRequest], mailbox: Mailbox) -> None:
        """Send requests that were accepted once; if no replica is ready, as soon as one is."""
        unplaced = [request for request in requests if not self._place(request, mailbox)]
        if unplaced:
            with self._lock:
                self._parked.append((unplaced, mailbox))
            if self._ready() or not self._has_hope():  # one has become ready in between, or none will
                self._serve_parked()

    def send(self, aborts: Iterable[AbortRequest]) -> None:
        """Each to the replica that has its request."""
        for abort in aborts:
            if client := self._places.get(abort.request_id):
                client.send([abort])

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop what is known of requests that are over."""
        for request_id in request_ids:
            if client := self._places.pop(request_id, None):
                client.forget([request_id])

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests whose client has gone; nothing more arrives for them."""
        gone = set(request_ids)
        with self._lock:
            left = [([r for r in requests if r.request_id not in gone], box) for requests, box in self._parked]
            self._parked = [(requests, box) for requests, box in left if requests]
        for request_id in request_ids:
            if client := self._places.pop(request_id, None):
                client.abort([request_id])

    def refused(self, reason: str) -> None:
        """Count a request that was turned away on this side."""
        for replica in self._ready()[:1]:
            replica.client.refused(reason)

    def retire(self) -> None:
        """The deployment is being unloaded: send nothing more, read what still comes."""
        self.update([])

    # Inside

    def _ready(self) -> list[PooledReplica]:
        return [replica for replica in self.replicas.values() if replica.client.is_ready]

    def _has_hope(self) -> bool:
        """Whether a replica is ready or may become so."""
        return any(replica.status.state != "failed" for replica in self.replicas.values())

    def _check_load(self, num_requests: int) -> None:
        """Raises QueueFullError unless a replica would take its share."""
        ready = sorted(self._ready(), key=lambda replica: replica.client.num_live_requests)
        if ready:
            ready[0].client.check_load(-(-num_requests // len(ready)))

    def _place(self, request: GenerateRequest, mailbox: Mailbox) -> bool:
        """Send a request to the best replica, if one is ready."""
        ready, seen = self._ready(), self._seen
        prompt, salt = request.prompt_token_ids, request.cache_salt
        known = {} if seen is None else seen.num_known_tokens(prompt, salt, [replica.engine for replica in ready])

        def cost(replica: PooledReplica) -> tuple[int, int]:
            num_new = len(prompt) - known.get(replica.engine, 0)
            load = replica.client.num_live_requests
            return num_new + REQUEST_COST_TOKENS * load, replica.client.num_submitted

        for replica in sorted(ready, key=cost):
            client = self._places[request.request_id] = replica.client
            try:
                client.submit([request], mailbox)
            except EngineDeadError:
                continue
            if seen is not None:
                seen.note(prompt, salt, replica.engine)
            return True
        self._places.pop(request.request_id, None)
        return False

    def _serve_parked(self) -> None:
        """Place what waits for a replica, or give it up if none will come."""
        with self._lock:
            parked, self._parked = self._parked, []
        for requests, mailbox in parked:
            if self._has_hope():
                self.resubmit(requests, mailbox)
                if mailbox.is_closed:  # while it was neither parked nor placed
                    self.abort([request.request_id for request in requests])
            else:
                mailbox.put(lambda: EngineDeadError("no engine is left to compute this request"))

    def _pooled(self, status: ReplicaStatus, known: PooledReplica | None) -> PooledReplica:
        if known is not None:
            return PooledReplica(known.name, known.client, status)
        folder = Path(status.folder)
        client = self._make_client(folder)
        client.on_ready.append(self._welcome)
        client.connect()
        return PooledReplica(folder.name.lstrip("e"), client, status)

    def _welcome(self, status: EngineStatus) -> None:
        for call in self.on_ready:
            call(status)
        self._serve_parked()


def _open_index(folder: Path) -> PrefixIndex | None:
    try:
        return PrefixIndex(folder)
    except OSError as error:
        logger.warning("requests go to replicas by load alone: no room to note prefixes in %s: %s", folder, error)
        return None
