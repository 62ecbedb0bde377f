"""Host arrays on their way to the GPU: through a few page-locked buffers, in pieces, as fast as disk or bus allow.

    mapped file ──threads──▶ pinned buffers, in turn ──copy engine──▶ GPU, converted there if the dtypes differ

Reading a piece overlaps with copying the ones before it, and the host never holds more than the buffers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_engine.device import Array

PIECE_BYTES = 8 << 20
_MAX_THREADS = 8


@dataclass(slots=True)
class _Buffer:
    """Page-locked bytes, and the event behind the last copy out of them."""

    memory: np.ndarray  # [PIECE_BYTES] uint8
    copied: Any

    def fill(self, piece: np.ndarray) -> np.ndarray:
        """``piece`` as a contiguous array in this memory, once the last copy has left it."""
        self.copied.synchronize()
        filled = self.memory[: piece.nbytes].view(piece.dtype).reshape(piece.shape)
        np.copyto(filled, piece)
        return filled


class PinnedUploads:
    """Copies to the current GPU, enqueued on one stream.

    Args:
        stream: the stream.
        num_threads: how many pieces are read at once; default: one per core, up to 8.
    """

    def __init__(self, stream: Any, num_threads: int | None = None) -> None:
        import cupy
        import cupyx

        num_threads = num_threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._stream = stream
        self._threads = ThreadPoolExecutor(num_threads, "upload")
        self._buffers = deque(
            _Buffer(cupyx.empty_pinned(PIECE_BYTES, np.uint8), cupy.cuda.Event(disable_timing=True))
            for _ in range(num_threads + 1)
        )

    def copy(self, source: np.ndarray, target: Array) -> None:
        """Enqueue the copy of ``source``, converted to the dtype of ``target``, a contiguous array of the same shape.

        ``source`` has been read when this returns.
        """
        under_way: deque[tuple[_Buffer, Future[np.ndarray], Array]] = deque()
        for piece, goal in pieces(source, target, PIECE_BYTES):
            if not self._buffers:
                self._send(*under_way.popleft())
            buffer = self._buffers.popleft()
            under_way.append((buffer, self._threads.submit(buffer.fill, piece), goal))
        while under_way:
            self._send(*under_way.popleft())

    def _send(self, buffer: _Buffer, filling: Future[np.ndarray], goal: Array) -> None:
        import cupy

        host = filling.result()
        raw = goal if goal.dtype == host.dtype else cupy.empty(goal.shape, host.dtype)
        kind = cupy.cuda.runtime.memcpyHostToDevice
        cupy.cuda.runtime.memcpyAsync(raw.data.ptr, host.ctypes.data, host.nbytes, kind, self._stream.ptr)
        buffer.copied.record(self._stream)
        self._buffers.append(buffer)
        if raw is not goal:
            goal[...] = raw

    def close(self) -> None:
        """Wait for the copies and give threads and buffers back."""
        self._stream.synchronize()
        self._threads.shutdown()
        self._buffers.clear()


def pieces(source: np.ndarray, target: Array, max_bytes: int) -> Iterator[tuple[np.ndarray, Array]]:
    """Cut two arrays of one shape into the same pieces, each at most ``max_bytes`` of ``source``."""
    row_bytes = source[:1].nbytes
    if source.flags.c_contiguous or row_bytes > max_bytes:
        source, target = np.ascontiguousarray(source).reshape(-1), target.reshape(-1)
        row_bytes = source.itemsize
    num_rows = max(1, max_bytes // max(1, row_bytes))
    for start in range(0, len(source), num_rows):
        rows = slice(start, start + num_rows)
        yield source[rows], target[rows]
