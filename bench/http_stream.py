"""A streamed HTTP answer, read as it arrives: the bytes of a connection in, the data of server-sent events out."""

from __future__ import annotations

_HEAD_END = b"\r\n\r\n"


class StreamReader:
    """Reads one response: feed it what the socket gives. Understands chunked bodies, sized ones, and read-to-the-end.

    ``status`` is ``None`` until the head is there; ``is_done`` once the body is whole.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.is_done = False
        self.keeps_alive = True
        self._raw = bytearray()
        self._text = bytearray()
        self._is_chunked = False
        self._num_left: int | None = None  # bytes of the body, or of the chunk; None: until the connection ends

    @property
    def text(self) -> str:
        """What of the body is no whole event; all of an answer that is no stream."""
        return self._text.decode("utf-8", "replace")

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are whole now. Comments are dropped.

        Raises:
            ValueError: this is no HTTP.
        """
        self._raw += data
        if self.status is None and not self._read_head():
            return []
        self._read_body()
        if b"\n\n" not in self._text:
            return []
        *events, rest = self._text.split(b"\n\n")
        self._text = rest
        return [bytes(event[6:]) for event in events if event.startswith(b"data: ")]

    def _read_head(self) -> bool:
        end = self._raw.find(_HEAD_END)
        if end < 0:
            return False
        first, *lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + len(_HEAD_END)]
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"this is no HTTP: {first[:40]!r}")
        self.status = int(status[:3])
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in (x.partition(":") for x in lines)}
        self._is_chunked = headers.get("transfer-encoding") == "chunked"
        self.keeps_alive = headers.get("connection") != "close"
        if not self._is_chunked:
            self._num_left = int(headers["content-length"]) if "content-length" in headers else None
            self.keeps_alive &= self._num_left is not None
        return True

    def _read_body(self) -> None:
        if not self._is_chunked:
            self._take(len(self._raw))
            self.is_done = self._num_left == 0
            return
        while not self.is_done and (self._num_left or self._read_chunk_head()):
            if not self._raw:
                return
            assert self._num_left is not None
            self._take(min(self._num_left, len(self._raw)))

    def _read_chunk_head(self) -> bool:
        """Read the size of the next chunk, if it is there and not the end; the last chunk's line end comes first."""
        start = 2 if self._raw.startswith(b"\r\n") else 0
        end = self._raw.find(b"\r\n", start)
        if end < 0:
            return False
        num_bytes = int(self._raw[start:end].split(b";")[0], 16)
        if num_bytes == 0:
            self.is_done = self._raw.endswith(b"\r\n\r\n")
            return False
        self._num_left = num_bytes
        del self._raw[: end + 2]
        return True

    def _take(self, num_bytes: int) -> None:
        self._text += self._raw[:num_bytes].replace(b"\r", b"")  # JSON holds no bare carriage return
        del self._raw[:num_bytes]
        if self._num_left is not None:
            self._num_left -= num_bytes
