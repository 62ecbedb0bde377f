"""gunicorn's threaded worker, with streams on a thread of their own and no client that holds up or cuts off others."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from gunicorn.http.body import Body, ChunkedReader
from gunicorn.http.wsgi import Response
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from .arrivals import ARRIVED, CROWDED_PATIENCE_S, PATIENCE_S, Arrivals, arrival_of
from .descriptors import make_room
from .draining import EXTENSION
from .event_stream import GUNICORN_RESPONSE, EventStream, HandedOver
from .lingering import LingeringConnections
from .stream_loop import StreamLoop

logger = logging.getLogger(__name__)

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
MAX_SKIPPED_BYTES = 1 << 15  # of a body that nobody read; less than gunicorn skips
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_ROOM_PAUSE_S = 0.01
_SWITCH_INTERVAL_S = 0.0005  # many threads have little to do each: none should wait long for Python's lock


class StreamWorker(ThreadWorker):  # type: ignore[misc]
    """Request threads parse, tokenize and send the first token; a StreamLoop writes the rest of every stream.

    A stream's connection counts as gunicorn's until the stream ends, and then goes back to it: kept alive or closed.
    A connection that has not been announced as closing is closed only where it has been idle for ``keepalive`` seconds.
    """

    wsgi: Application
    nr_conns: int
    worker_connections: int
    max_keepalived: int

    def init_process(self) -> None:
        self._handled = threading.local()  # arrived_s: of the request that a thread handles
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._streams = StreamLoop()
        self._streams.start()
        self._limit_connections()
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        models = getattr(self.wsgi, "extensions", {}).get(EXTENSION)
        self._max_body_bytes = max(MAX_SKIPPED_BYTES, models.config.max_body_bytes if models else 0)
        # TLS writes may have to read, so those streams keep their threads
        self.wsgi = _with_response(_with_arrival(self.wsgi, self._handled), offers_hand_over=not self.cfg.is_ssl)

    def run(self) -> None:
        self._lingering = LingeringConnections(self.poller, self._count_closed)
        self._arrivals = Arrivals(self.poller, self._max_body_bytes, super().enqueue_req, self._lingering.add)
        super().run()

    def enqueue_req(self, conn: Any) -> None:
        """Let a request come before it takes a thread, if that can tell what it sees."""
        if self.cfg.is_ssl or self.cfg.proxy_protocol != "off" or "h2" in self.cfg.http_protocols:
            super().enqueue_req(conn)
        else:
            self._arrivals.add(conn)

    def accept(self, listener: socket.socket) -> None:
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            time.sleep(_NO_ROOM_PAUSE_S)  # the client waits in the listener's queue

    def handle(self, conn: Any) -> Any:
        arrival = arrival_of(conn)
        self._handled.arrived_s = None if arrival is None else arrival.whole_s
        try:
            return super().handle(conn)
        except HandedOver as handed_over:
            stream = handed_over.stream
            self._streams.take_over(stream, conn.sock, partial(self.method_queue.defer, self._resume, conn))
            return stream

    def finish_request(self, conn: Any, fs: Future[Any]) -> None:
        result = False if fs.cancelled() or fs.exception() is not None else fs.result()
        if isinstance(result, EventStream):
            return  # its end brings the connection back, or has done so already
        arrival = arrival_of(conn)
        if not result or (arrival is not None and arrival.ran_dry):
            self._lingering.add(conn.sock)
        elif arrival is not None and arrival.data:  # the next request's
            self.enqueue_req(conn)
        else:
            super().finish_request(conn, fs)

    def murder_keepalived(self, force: bool = False) -> None:
        """Closes idle connections, but looks once more whether they are: a request may have come meanwhile."""
        if self.keepalived_conns and self.keepalived_conns[0].timeout <= time.monotonic():
            self.wait_for_and_dispatch_events(timeout=0)
        super().murder_keepalived(force)

    def murder_pending(self) -> None:
        super().murder_pending()
        patience_s = PATIENCE_S if self.nr_conns < self.worker_connections else CROWDED_PATIENCE_S
        self._arrivals.close_late(patience_s if self.alive else STOP_KEEPALIVE_LINGER)
        self._lingering.close_late()

    def _resume(self, conn: Any, is_reusable: bool) -> None:
        """Back on gunicorn's thread: as if the request's handler had just returned."""
        done: Future[bool] = Future()
        done.set_result(is_reusable)
        self.finish_request(conn, done)

    def _count_closed(self) -> None:
        self.nr_conns -= 1

    def _limit_connections(self) -> None:
        num_connections = make_room(self.worker_connections)
        if num_connections < self.worker_connections:
            limit = f"the limit of open files allows {num_connections} connections"
            logger.warning("%s, not worker_connections = %d; raise it (ulimit -n)", limit, self.worker_connections)
            self.max_keepalived = max(0, self.max_keepalived + num_connections - self.worker_connections)
            self.worker_connections = num_connections


def _with_arrival(application: Application, handled: threading.local) -> Application:
    """Tells ``application`` when a request came, where that is known: it may have waited for a thread."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if handled.arrived_s is not None:
            environ[ARRIVED] = handled.arrived_s
        return application(environ, start_response)

    return call


def _with_response(application: Application, *, offers_hand_over: bool) -> Application:
    """Lets ``application`` see gunicorn's response where it may leave that to a stream loop."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        response: Any = getattr(start_response, "__self__", None)
        if type(response) is not Response:  # HTTP/2's frames its data itself
            return application(environ, start_response)
        if offers_hand_over:
            environ[GUNICORN_RESPONSE] = response

        def start(*arguments: Any) -> Any:
            if _is_too_long_to_skip(environ["wsgi.input"]):  # so the connection must end, and the client must know
                response.force_close()
            return start_response(*arguments)

        return application(environ, start)

    return call


def _is_too_long_to_skip(body: Body) -> bool:
    """Whether what is left of a request's body keeps the next request from being found."""
    if body.failed:
        return True
    if isinstance(body.reader, ChunkedReader):
        return body.reader.parser is not None
    return getattr(body.reader, "length", 0) > MAX_SKIPPED_BYTES
