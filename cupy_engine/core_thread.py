"""The thread that owns an EngineCore in this process: takes commands from any thread, hands outputs to who asked."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress

from cupy_engine.core import EngineCore
from cupy_engine.core_loop import CoreLoop
from cupy_engine.errors import EngineDeadError, InvalidRequestError
from cupy_engine.messages import AbortRequest, Command, GenerateRequest, Reply, SequenceOutput

Outputs = list[SequenceOutput]
Receiver = Callable[[Outputs], None]  # called on the core's thread with what one step gave its caller

_CLOSE_TIMEOUT_S = 30.0


class CoreThread:
    """Runs a core until closed. All methods may be called from any thread."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._inbox = _QueueInbox()
        self._loop = CoreLoop(core, self._inbox, self._deliver)
        self._receivers: dict[str, Receiver] = {}
        self._lock = threading.Lock()
        self._is_dead = False
        self._thread = threading.Thread(target=self._run, name="cupy-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, receiver: Receiver) -> None:
        """Add a request. A step's outputs for requests with one receiver come in one call.

        Raises:
            EngineDeadError: the thread has ended.
            InvalidRequestError: the id belongs to a live request.
        """
        with self._lock:
            if self._is_dead or not self._thread.is_alive():
                raise EngineDeadError("the engine is closed; make a new one")
            if request.request_id in self._receivers:
                raise InvalidRequestError(
                    "request_id", f"request_id {request.request_id!r} is in use by a live request"
                )
            self._receivers[request.request_id] = receiver
        self._inbox.put(request)

    def send(self, abort: AbortRequest) -> None:
        """Stop a request or one of its sequences; its receiver hears no more of what was stopped."""
        self._inbox.put(abort)

    def release(self, request_id: str, *, is_finished: bool) -> None:
        """Nobody waits for the request any more."""
        with self._lock:
            self._receivers.pop(request_id, None)
        if not is_finished:
            self._inbox.put(AbortRequest(request_id=request_id))

    def abort(self, request_id: str) -> None:
        """End a request; its receiver gets one last output, with ``finish_reason`` "abort". Unknown ids are ignored."""
        with self._lock:
            receiver = self._receivers.get(request_id)
        if receiver is not None:
            self._inbox.put(AbortRequest(request_id=request_id))
            receiver([SequenceOutput(request_id=request_id, finish_reason="abort")])

    def close(self, drain_timeout_s: float) -> None:
        """Finish what runs, for at most this long, fail the rest, and end."""
        self._loop.stop(drain_timeout_s)
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(drain_timeout_s + _CLOSE_TIMEOUT_S)

    def _deliver(self, replies: Sequence[Reply]) -> None:
        outputs_of: defaultdict[Receiver, Outputs] = defaultdict(list)
        with self._lock:
            for reply in replies:
                if isinstance(reply, SequenceOutput):  # nobody in this process asks for anything else
                    receiver = self._receivers.get(reply.request_id)
                    if receiver is not None:
                        outputs_of[receiver].append(reply)
        for receiver, outputs in outputs_of.items():
            receiver(outputs)

    def _run(self) -> None:
        try:
            self._loop.run()
        finally:
            with self._lock:
                self._is_dead = True
                left = dict(self._receivers)
            for request_id, receiver in left.items():
                dead = SequenceOutput(request_id=request_id, finish_reason="error", error_kind="dead")
                dead.error = "the engine has stopped"
                receiver([dead])


class _QueueInbox:
    """Commands from other threads of this process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def put(self, command: Command | None) -> None:
        """``None`` only wakes the receiver up."""
        self._queue.put(command)

    def receive(self, timeout_s: float | None) -> list[Command]:
        commands: list[Command | None] = []
        with suppress(queue.Empty):
            commands.append(self._queue.get(block=timeout_s != 0, timeout=timeout_s or None))
            while True:
                commands.append(self._queue.get_nowait())
        return [command for command in commands if command is not None]
