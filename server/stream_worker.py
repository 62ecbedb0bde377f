"""gunicorn's threaded worker, with streams on a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from gunicorn.http.wsgi import Response
from gunicorn.workers.gthread import ThreadWorker

from .event_stream import GUNICORN_RESPONSE, EventStream, HandedOver
from .stream_loop import StreamLoop

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class StreamWorker(ThreadWorker):  # type: ignore[misc]
    """Request threads parse, tokenize and wait for the first token; a StreamLoop writes the rest of every stream.

    A stream's connection counts as gunicorn's until the stream ends, and then goes back to it: kept alive or closed.
    """

    wsgi: Application

    def init_process(self) -> None:
        self._streams = StreamLoop()
        self._streams.start()
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        if not self.cfg.is_ssl:  # TLS writes may have to read, so those streams keep their threads
            self.wsgi = _offer_hand_over(self.wsgi)

    def handle(self, conn: Any) -> Any:
        try:
            return super().handle(conn)
        except HandedOver as handed_over:
            return handed_over.stream

    def finish_request(self, conn: Any, fs: Future[Any]) -> None:
        if not fs.cancelled() and fs.exception() is None and isinstance(stream := fs.result(), EventStream):
            self._streams.take_over(stream, conn.sock, partial(self.method_queue.defer, self._resume, conn))
        else:
            super().finish_request(conn, fs)

    def _resume(self, conn: Any, is_reusable: bool) -> None:
        """Back on gunicorn's thread: as if the request's handler had just returned."""
        if is_reusable:
            done: Future[bool] = Future()
            done.set_result(True)
            super().finish_request(conn, done)
        else:  # the request has been read to its end, so there is nothing to linger for
            self.nr_conns -= 1
            conn.close()


def _offer_hand_over(application: Application) -> Application:
    def offer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        response = getattr(start_response, "__self__", None)
        if type(response) is Response:  # not HTTP/2's, which frames its data itself
            environ[GUNICORN_RESPONSE] = response
        return application(environ, start_response)

    return offer
