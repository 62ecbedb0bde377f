"""All streams of a worker on one thread: no stream holds a thread, and a step's tokens cost one wake-up, not one each.

I/O thread ── post(writer, mail) ──▶ StreamLoop: detokenize, encode, send without waiting ──▶ sockets
"""

from __future__ import annotations

import collections
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from .event_stream import EventStream
from .mailbox import Mail
from .stream_writer import StreamWriter

logger = logging.getLogger(__name__)

TICK_S = 0.25  # how exactly streams keep their times


class StreamLoop(threading.Thread):
    """Takes streams over from request threads and writes them until they end."""

    def __init__(self) -> None:
        super().__init__(name="streams", daemon=True)
        self._inbox: collections.deque[tuple[StreamWriter, Mail | None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_woken = False
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._writers: dict[int, StreamWriter] = {}
        self._blocked: set[int] = set()  # descriptors that wait for EPOLLOUT
        self._next_tick_s = 0.0

    def take_over(self, stream: EventStream, connection: socket.socket, on_end: Callable[[bool], None]) -> None:
        """Write a stream whose headers are out: here and now what has come, which no other thread delays. Any thread.

        Args:
            on_end: called on this loop's thread; its argument says whether the connection can take another request.
        """
        writer = StreamWriter(stream, connection, on_end)
        writer.advance()
        self._post(writer, None)
        stream.generation.redirect(lambda mail: self._post(writer, mail))

    def _post(self, writer: StreamWriter, mail: Mail | None) -> None:
        """Any thread. ``None`` announces a new writer."""
        self._inbox.append((writer, mail))
        if not self._is_woken:
            self._is_woken = True  # the loop clears it before it empties the inbox, so nothing stays behind
            os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        while True:
            try:
                self._round()
            except Exception:
                logger.exception("unexpected error in the stream loop")

    def _round(self) -> None:
        for descriptor, _ in self._epoll.poll(TICK_S if self._writers else None):
            if descriptor == self._wake:
                os.eventfd_read(self._wake)
            elif writer := self._writers.get(descriptor):
                self._advance(writer)
        self._is_woken = False
        self._empty_inbox()
        now_s = time.monotonic()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            for writer in list(self._writers.values()):
                writer.tick(now_s)
                self._advance(writer)

    def _empty_inbox(self) -> None:
        touched: dict[StreamWriter, None] = {}
        for _ in range(len(self._inbox)):
            writer, mail = self._inbox.popleft()
            if mail is None:
                self._writers[writer.descriptor] = writer
            else:
                writer.take(mail)
            touched[writer] = None
        for writer in touched:
            if self._writers.get(writer.descriptor) is writer:
                self._advance(writer)

    def _advance(self, writer: StreamWriter) -> None:
        """Let it send what it can; then wait until its connection takes more, or part with it."""
        writer.advance()
        descriptor = writer.descriptor
        if writer.is_blocked != (descriptor in self._blocked):
            if writer.is_blocked:
                self._blocked.add(descriptor)
                self._epoll.register(descriptor, select.EPOLLOUT)
            else:
                self._blocked.remove(descriptor)
                self._epoll.unregister(descriptor)
        if writer.is_over:
            del self._writers[descriptor]
            writer.close()
