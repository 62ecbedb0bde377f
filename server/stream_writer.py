"""One stream as a StreamLoop writes it: never waiting for its client."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Protocol

from cupy_engine.outputs import CompletionDelta

from .api_errors import ClientGoneError
from .event_stream import KEEP_ALIVE, EventStream, error_event
from .generation import PromptDelta, late_error
from .mailbox import Mail


class Response(Protocol):
    """What a writer asks gunicorn's response."""

    chunked: bool

    def should_close(self) -> bool: ...


class StreamWriter:
    """Turns mail into events and events into what the connection takes.

    A client that reads slowly holds up nobody: what its connection does not take stays in ``_unsent``, and deltas that
    come meanwhile wait unencoded, to become one chunk per choice. So a stream's memory is bounded by its own request,
    and ``client_write_timeout_s`` ends it.

    ``is_blocked``: call :meth:`advance` when the connection takes more. ``is_over``: call :meth:`close`.
    """

    def __init__(self, stream: EventStream, connection: socket.socket, on_end: Callable[[bool], None]) -> None:
        self.descriptor = connection.fileno()
        self.is_blocked = False
        self.is_over = False
        self._stream = stream
        self._response: Response = stream.response
        self._connection = connection
        self._on_end = on_end
        self._deltas: list[PromptDelta] = stream.take_first()
        self._unsent = memoryview(b"")
        self._error_event = b""
        self._has_said_all = False
        self._is_reusable = False
        self._active_s = time.monotonic()

    def take(self, mail: Mail) -> None:
        """What the engine, or the client's watcher, has to say."""
        if self.is_over or self._has_said_all or self._error_event:
            return
        try:
            self._deltas += self._stream.generation.take(mail)
        except ClientGoneError:
            self._end()
        except Exception as error:
            self._error_event = error_event(error)

    def tick(self, now_s: float) -> None:
        """What time brings: a comment for a client that waits, an end for one that does not read or came too late."""
        config, idle_s = self._stream.config, now_s - self._active_s
        if self._unsent:
            if idle_s >= config.client_write_timeout_s:
                self._end()
        elif self._stream.generation.is_late:
            self.take(late_error)
        elif idle_s >= config.keep_alive_comment_s:
            self._unsent = memoryview(self._framed(KEEP_ALIVE))

    def advance(self) -> None:
        """Send as much as the connection takes."""
        while not self.is_over:
            if self._unsent:
                self._send()
                if self.is_blocked:
                    return
            elif self._has_said_all:
                self._is_reusable = not self._response.should_close()
                self._end()
            elif self._deltas or self._error_event:
                self._unsent = memoryview(self._framed(self._next_events()))
            else:
                return

    def close(self) -> None:
        """Part with the connection."""
        self._stream.generation.close()
        self._on_end(self._is_reusable)

    def _next_events(self) -> bytes:
        deltas, self._deltas = self._deltas, []
        try:
            events = self._stream.encode(deltas if len(deltas) == 1 else _merged(deltas))
            if self._error_event:
                events += self._error_event
            elif self._stream.generation.finished:
                events += self._stream.ending()
            else:
                return events
        except Exception as error:
            events = error_event(error)
        self._has_said_all = True
        return events

    def _framed(self, events: bytes) -> bytes:
        if not self._response.chunked:
            return events
        body = b"%X\r\n%b\r\n" % (len(events), events) if events else b""
        return body + b"0\r\n\r\n" if self._has_said_all else body

    def _send(self) -> None:
        try:
            num_sent = self._connection.send(self._unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            num_sent = 0
        except OSError:
            self._end()
            return
        if num_sent:
            self._active_s = time.monotonic()
            self._unsent = self._unsent[num_sent:]
        self.is_blocked = len(self._unsent) > 0

    def _end(self) -> None:
        self.is_over = True
        self.is_blocked = False


def _merged(deltas: list[PromptDelta]) -> list[PromptDelta]:
    """One delta per choice."""
    by_choice: dict[tuple[int, int], list[CompletionDelta]] = {}
    for each in deltas:
        by_choice.setdefault((each.prompt_index, each.delta.index), []).append(each.delta)
    return [PromptDelta(prompt_index, _joined(parts)) for (prompt_index, _), parts in by_choice.items()]


def _joined(parts: list[CompletionDelta]) -> CompletionDelta:
    last = parts[-1]
    if len(parts) == 1:
        return last
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionDelta(
        last.index,
        "".join(part.text for part in parts),
        [token_id for part in parts for token_id in part.token_ids],
        [entry for entries in logprobs for entry in entries] if logprobs else None,
        last.finish_reason,
        last.stop_reason,
    )
