"""A streamed answer: the body of a WSGI response, written by the request's own thread or handed over to a StreamLoop.

             request thread                                       stream thread
gthread      wait, encode, write, wait …
StreamWorker wait for the first delta, headers, that delta  ──▶  everything else, of all streams of the worker
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from .api_errors import ClientGoneError, to_api_error
from .client_watcher import wait_writable
from .generation import Generation, PromptDelta
from .logprob_format import Json
from .server_config import ServerConfig
from .streaming import Chunks

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
GUNICORN_RESPONSE = "cupy_engine.gunicorn_response"  # in a WSGI environment: the worker takes streams over


class HandedOver(BaseException):
    """Leaves gunicorn's request handler without an end to the response: ``stream`` will be written elsewhere.

    No Exception, because gunicorn answers those.
    """

    def __init__(self, stream: EventStream) -> None:
        self.stream = stream


class EventStream:
    """Everything a streaming client receives.

    Args:
        generation: closed with the stream.
        first: what has arrived already.
        response: gunicorn's, if its worker can take the stream over.
    """

    def __init__(
        self,
        generation: Generation,
        first: list[PromptDelta],
        chunks: Chunks,
        config: ServerConfig,
        response: Any = None,
    ) -> None:
        self.generation = generation
        self.config = config
        self.response = response
        self._first = first
        self._chunks = chunks
        self._is_handed_over = False

    def __iter__(self) -> Iterator[bytes]:
        if self.response is None:
            return self._write_here()
        self.response.send_headers()
        self._is_handed_over = True
        raise HandedOver(self)

    def close(self) -> None:
        """WSGI's end of the response. Aborts what has not finished, unless that is another's business now."""
        if not self._is_handed_over:
            self.generation.close()

    def take_first(self) -> list[PromptDelta]:
        """What had arrived before the stream was handed over."""
        first, self._first = self._first, []
        return first

    def encode(self, deltas: list[PromptDelta]) -> bytes:
        """The events of these deltas; none if they say nothing yet."""
        return b"".join([_event(chunk) for each in deltas for chunk in self._chunks.of(each, self.generation)])

    def ending(self) -> bytes:
        """What follows the last delta."""
        last = self._chunks.usage(self.generation.results())
        return (_event(last) if last else b"") + DONE

    def _write_here(self) -> Iterator[bytes]:
        try:
            arrived = self.take_first()
            while True:
                events = self.encode(arrived)
                if events or not arrived:
                    self._require_reader()
                    yield events or KEEP_ALIVE
                if self.generation.finished:
                    break
                arrived = self.generation.receive(self.config.keep_alive_comment_s)
            yield self.ending()
        except ClientGoneError:
            return
        except Exception as error:
            yield error_event(error)

    def _require_reader(self) -> None:
        connection = self.generation.connection
        if connection is not None and not wait_writable(connection, self.config.client_write_timeout_s):
            raise ClientGoneError


def error_event(error: Exception) -> bytes:
    """How a stream says that it failed, and ends."""
    return _event(to_api_error(error).body()) + DONE


def _event(body: Json) -> bytes:
    """One event, with a name if its body has a type: those of the Responses API do."""
    name = b"event: " + body["type"].encode() + b"\n" if "type" in body else b""
    return name + b"data: " + msgspec.json.encode(body) + b"\n\n"
