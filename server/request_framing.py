"""Where a request ends among a connection's bytes. What they mean, and whether they are allowed, the parser says."""

from __future__ import annotations

import re

MAX_HEAD_BYTES = 1 << 20  # gunicorn takes less
_MAX_LINE_BYTES = 1 << 14
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)
_DIGITS = re.compile(rb"[0-9]{1,18}")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked", re.IGNORECASE)
_EXPECTING = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(;.*)?", re.DOTALL)


class RequestFraming:
    """Follows one request while its bytes come, and looks at each but once.

    Args:
        max_body_bytes: a body that is longer is not waited for: it will be refused.

    ``expects_continue``: the client sends the body when it is told to go on.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._position = 0  # all before has been looked at
        self._end: int | None = None  # at least so long is the request, once its head is known
        self._is_chunked = False
        self.expects_continue = False

    def is_whole(self, data: bytearray) -> bool:
        """Whether a request has come, or enough of what the parser will refuse. ``data``: all that has come."""
        if self._end is None and not self._read_head(data):
            return len(data) > MAX_HEAD_BYTES
        assert self._end is not None
        return self._read_chunks(data) if self._is_chunked else len(data) >= self._end

    def _read_head(self, data: bytearray) -> bool:
        end = data.find(b"\r\n\r\n", max(0, self._position - 3))
        self._position = len(data)
        if end < 0:
            return False
        head = bytes(data[: end + 2])
        self._end = self._position = end + 4
        lengths = _LENGTH.findall(head)
        if _CHUNKED.search(head):
            self._is_chunked = True
        elif len(lengths) == 1 and _DIGITS.fullmatch(lengths[0]) and int(lengths[0]) <= self._max_body_bytes:
            self._end += int(lengths[0])
        self.expects_continue = _EXPECTING.search(head) is not None and (self._is_chunked or self._end > end + 4)
        return True

    def _read_chunks(self, data: bytearray) -> bool:
        """``_position`` is where a chunk begins."""
        while (end := data.find(b"\r\n", self._position, self._position + _MAX_LINE_BYTES)) >= 0:
            chunk = _CHUNK.fullmatch(data, self._position, end)
            if chunk is None:
                return True
            num_bytes = int(chunk[1], 16)
            if num_bytes == 0:
                return data.find(b"\r\n\r\n", end) >= 0 or len(data) - end > MAX_HEAD_BYTES
            if end + num_bytes > 2 * self._max_body_bytes:
                return True
            self._position = end + 2 + num_bytes + 2
        return len(data) - self._position > _MAX_LINE_BYTES
