"""A streamed HTTP answer, read as it arrives: the bytes of a connection in, the data of server-sent events out."""

from __future__ import annotations

_HEAD_END = b"\r\n\r\n"


class StreamReader:
    """Reads one response: feed it what the socket gives. Understands chunked bodies, sized ones, and read-to-the-end.

    ``status`` is 0 until the head is there; ``is_done`` once the body is whole.
    """

    def __init__(self) -> None:
        self.status = 0
        self.is_done = False
        self.keeps_alive = True
        self._raw = b""  # not understood yet
        self._text = b""  # of the body; no whole event yet
        self._is_chunked = False
        self._num_left: int | None = None  # bytes of the body, or of the chunk; None: until the connection ends

    @property
    def text(self) -> str:
        """What of the body is no whole event; all of an answer that is no stream."""
        return self._text.decode("utf-8", "replace")

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are whole now; ``data`` is empty at the end of the connection. Drops comments.

        Raises:
            ValueError: this is no HTTP.
        """
        if not data:
            self.is_done = self.is_done or (bool(self.status) and self._num_left is None and not self._is_chunked)
            return []
        self._raw += data
        if not self.status and not self._read_head():
            return []
        text = self._text + (self._read_chunks() if self._is_chunked else self._read_plain())
        if b"\r" in text:
            text = text.replace(b"\r", b"")  # JSON holds no bare carriage return
        *events, self._text = text.split(b"\n\n")
        return [event[6:] for event in events if event.startswith(b"data: ")]

    def _read_head(self) -> bool:
        head, separator, rest = self._raw.partition(_HEAD_END)
        if not separator:
            return False
        self._raw = rest
        first, *lines = head.decode("latin-1").split("\r\n")
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

    def _read_plain(self) -> bytes:
        text, self._raw = self._raw, b""
        if self._num_left is not None:
            self._num_left -= len(text)
            self.is_done = self._num_left <= 0
        return text

    def _read_chunks(self) -> bytes:
        """What has come of all chunks."""
        raw, place, num_left, text = self._raw, 0, self._num_left or 0, b""
        while place < len(raw):
            if num_left == 0:
                start = place + 2 if raw.startswith(b"\r\n", place) else place  # the last chunk's line end
                if (end := raw.find(b"\r\n", start)) < 0:
                    break
                num_left = int(raw[start:end].partition(b";")[0], 16)
                if num_left == 0:  # what is left is trailers and an empty line
                    self.is_done = raw.endswith(_HEAD_END)
                    break
                place = end + 2
            part = raw[place : place + num_left]
            text += part
            place += len(part)
            num_left -= len(part)
            if num_left == 0 and raw.startswith(b"\r\n", place):
                place += 2
        self._raw, self._num_left = raw[place:], num_left
        return text
