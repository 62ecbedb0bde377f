"""The engine's side of one HTTP request: its prompts run to their ends, or are aborted together."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cupy_engine.collector import RequestCollector
from cupy_engine.config import EngineConfig
from cupy_engine.errors import DeadlineExceededError
from cupy_engine.frontend import FrontEnd
from cupy_engine.messages import AbortRequest, GenerateRequest, SequenceOutput
from cupy_engine.outputs import CompletionDelta, RequestOutput

from .api_errors import ApiError, ClientGoneError
from .client_watcher import ClientWatcher
from .draining import Drain
from .engine_client import EngineLostError
from .key_limits import KeyLimits, Lease
from .mailbox import Mail
from .replica_pool import ReplicaPool
from .reports import CallReport, GenerationReport
from .server_config import ServerConfig

DEADLINE_GRACE_S = 2.0  # for the engine to report an expired deadline itself
MAX_REPLAYS = 2  # a request that ends one engine after another must not do so for ever


@dataclass(frozen=True, slots=True)
class Service:
    """What every request handler needs."""

    front_end: FrontEnd
    client: ReplicaPool
    watcher: ClientWatcher
    engine_config: EngineConfig
    config: ServerConfig
    key_limits: KeyLimits | None = None
    drain: Drain = field(default_factory=Drain)


@dataclass(frozen=True, slots=True)
class PromptDelta:
    """What arrived for the prompt with this number."""

    prompt_index: int
    delta: CompletionDelta


def late_error() -> DeadlineExceededError:
    return DeadlineExceededError("the request did not finish in time")


class Generation:
    """Live requests, one per prompt, that share a mailbox and a fate.

    A request that loses its engine before anything was told of it is computed afresh; else it fails.

    Args:
        name: for the log.
        requests: from :meth:`FrontEnd.make_request`.
        prompts: their texts, ``None`` where token ids were given.
        connection: the client's; when it is closed, everything is aborted.
        api_key: the client's, if clients have keys.
        call: the HTTP request; its reporter is told how it went.

    Raises:
        EngineDeadError: the engine takes no requests.
        QueueFullError, ApiError: it has too many, or this key has.
    """

    def __init__(
        self,
        service: Service,
        name: str,
        requests: Sequence[GenerateRequest],
        prompts: Sequence[str | None],
        connection: socket.socket | None,
        api_key: str | None = None,
        call: CallReport | None = None,
    ) -> None:
        self._service = service
        self._name = name
        self._requests = requests
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._prompts = prompts
        self._collectors: list[RequestCollector] = [
            service.front_end.collector(request, prompt) for request, prompt in zip(requests, prompts, strict=True)
        ]
        self._call = call
        self._tells_all_at_once = False
        self._told: set[int] = set()  # prompts of which something was told
        self._num_replays = [0] * len(requests)
        self._deadline_s = max(request.deadline_s or float("inf") for request in requests) + DEADLINE_GRACE_S
        self._failure: type[Exception] | None = None
        self._is_open = True
        self.connection = connection
        self._lease = self._enter(api_key)
        try:
            self._mailbox = service.client.submit(requests)
        except Exception as error:
            self._failure = type(error)
            self._leave()
            raise
        service.drain.enter(self._mailbox)
        if connection is not None:
            service.watcher.watch(connection, lambda: self._mailbox.put(ClientGoneError))

    @property
    def finished(self) -> bool:
        return all(collector.finished for collector in self._collectors)

    @property
    def is_late(self) -> bool:
        """Whether the engine should have reported an expired deadline by now, and has not."""
        return time.monotonic() > self._deadline_s

    def receive(self, timeout_s: float | None = None) -> list[PromptDelta]:
        """Wait for what comes next and return all of it; empty when ``timeout_s`` has passed.

        Raises:
            EngineError: one of the requests failed; the subclass says how.
            ClientGoneError: the client has hung up.
        """
        left_s = max(0.0, self._deadline_s - time.monotonic())
        wait_s = min(left_s, threading.TIMEOUT_MAX if timeout_s is None else timeout_s)
        deltas: list[PromptDelta] = []
        try:
            deltas += self.take(self._mailbox.get(wait_s))
            while True:
                deltas += self.take(self._mailbox.get_nowait())
        except queue.Empty:
            return self.take(late_error) if self.is_late and not deltas else deltas

    def take(self, mail: Mail) -> list[PromptDelta]:
        """What a piece of mail says; raises as :meth:`receive` does."""
        try:
            deltas = self._read(mail)
        except Exception as error:
            self._failure = type(error)
            raise
        if not self._tells_all_at_once:
            self._told.update(delta.prompt_index for delta in deltas)
        return deltas

    def redirect(self, receiver: Callable[[Mail], None]) -> None:
        """From now on mail goes to ``receiver``, on another thread, instead of :meth:`receive`."""
        self._mailbox.redirect(receiver)

    def run(self) -> list[RequestOutput]:
        """Wait for the end; raises as :meth:`receive` does."""
        self._tells_all_at_once = True
        if not any(request.params.stop for request in self._requests):  # nothing to look out for in between
            self._mailbox.hold_back()
        while not self.finished:
            self.receive()
        return self.results()

    def result(self, prompt_index: int) -> RequestOutput:
        """A prompt's result, as far as it has come."""
        return self._collectors[prompt_index].result()

    def results(self) -> list[RequestOutput]:
        """One per prompt."""
        return [collector.result() for collector in self._collectors]

    def close(self) -> None:
        """Abort what has not finished. Must be called; a second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._mailbox.close()
        self._service.drain.leave(self._mailbox)
        if self.connection is not None:
            self._service.watcher.forget(self.connection)
        live: list[str] = []
        done: list[str] = []
        for request, collector in zip(self._requests, self._collectors, strict=True):
            (done if collector.finished else live).append(request.request_id)
        self._service.client.forget(done)
        self._leave()
        if live:
            self._service.client.abort(live)
        self._report()

    def _read(self, mail: Mail) -> list[PromptDelta]:
        if not callable(mail):
            return [delta for output in mail for delta in self._collect(output)]
        try:
            raise mail()
        except EngineLostError as lost:
            if self._replay(lost):
                return []
            raise

    def _replay(self, lost: EngineLostError) -> bool:
        """Begin anew what an engine has left unfinished; whether all of it can be."""
        indexes = [self._index[request_id] for request_id in lost.request_ids]
        indexes = [index for index in indexes if not self._collectors[index].finished]
        if any(index in self._told or self._num_replays[index] >= MAX_REPLAYS for index in indexes):
            return False
        for index in indexes:
            self._num_replays[index] += 1
            self._collectors[index] = self._service.front_end.collector(self._requests[index], self._prompts[index])
        self._service.client.resubmit([self._requests[index] for index in indexes], self._mailbox)
        return True

    def _enter(self, api_key: str | None) -> Lease | None:
        limits = self._service.key_limits
        if limits is None or api_key is None or api_key not in limits:
            return None
        try:
            return limits.enter(api_key)
        except ApiError:
            self._service.client.refused("key_limit")
            raise

    def _leave(self) -> None:
        """What the requests took counts against their key."""
        if self._lease is not None:
            self._lease.close(sum(map(self._num_taken, self._requests, self._collectors)))

    def _num_taken(self, request: GenerateRequest, collector: RequestCollector) -> int:
        """Tokens of a request. Its prompt counts also if the client would not wait; what the server failed is free."""
        is_given_up = self._failure in (None, ClientGoneError, DeadlineExceededError)
        return collector.num_tokens or (len(request.prompt_token_ids) if is_given_up else 0)

    def _collect(self, output: SequenceOutput) -> list[PromptDelta]:
        index = self._index[output.request_id]
        collector = self._collectors[index]
        deltas = [PromptDelta(index, delta) for delta in collector.add(output)]
        aborts: list[AbortRequest] = collector.take_aborts()
        if aborts:
            self._service.client.send(aborts)
        return deltas

    def _report(self) -> None:
        if self._call is not None:
            report = GenerationReport(
                self._name,
                self._service.front_end.model_name,
                self._call,
                self._requests[0].params,
                self.results(),
                self.finished,
                "aborted" if self._failure is None else self._failure.__name__,
            )
            self._call.reporter.generated(report)
