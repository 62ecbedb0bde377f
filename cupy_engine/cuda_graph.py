"""Decode steps as CUDA graphs: captured once per batch bucket, replayed with one launch.

A captured graph repeats the same launches on the same addresses. So a step's integers arrive in buffers that never
move, everything the graph allocates comes from a memory pool of its own, and batches are padded to the next bucket.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from cupy_engine.device import Array


def batch_buckets(max_batch: int) -> list[int]:
    """Batch sizes worth a graph: 1, 2, 4, every 8 up to 64, every 16 up to 256, every 32 beyond, and the largest."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 1, 32)]
    return sorted({size for size in sizes if size < max_batch} | {max_batch})


class GraphSet:
    """Graphs of one computation by batch bucket.

    Args:
        stream: where graphs are captured and run.
        prepare: puts harmless inputs for a bucket where the computation reads them.
        compute: enqueues the computation for a bucket and returns its output.
        buckets: batch sizes, ascending.
    """

    def __init__(
        self,
        stream: Any,
        prepare: Callable[[int], None],
        compute: Callable[[int], Array],
        buckets: list[int],
    ) -> None:
        import cupy

        self._stream = stream
        self._prepare = prepare
        self._compute = compute
        self._buckets = buckets
        self._pool = cupy.cuda.MemoryPool()
        self._graphs: dict[int, tuple[Any, Array]] = {}

    def bucket(self, batch_size: int) -> int | None:
        """The smallest bucket that holds the batch; ``None`` if there is none."""
        index = bisect.bisect_left(self._buckets, batch_size)
        return self._buckets[index] if index < len(self._buckets) else None

    @property
    def pool_bytes(self) -> int:
        """Memory for intermediate arrays of the graphs, or of the largest of them."""
        return int(self._pool.total_bytes())

    def warm_up(self) -> None:
        """Run every bucket: compiling and choosing GEMM algorithms may not be captured. Largest first, as below."""
        for bucket in reversed(self._buckets):
            self._run_eagerly(bucket)

    def capture_all(self) -> None:
        """Capture every bucket, in place of what was captured before; they share their memory, so largest first."""
        self._graphs.clear()
        for bucket in reversed(self._buckets):
            self._graphs[bucket] = self._capture(bucket)

    def launch(self, bucket: int) -> Array:
        """Replay a bucket's graph; returns its output, valid until the next launch of any."""
        graph, output = self._graphs[bucket]
        graph.launch(self._stream)
        return output

    def _run_eagerly(self, bucket: int) -> None:
        import cupy

        with cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            self._prepare(bucket)
            self._compute(bucket)
        self._stream.synchronize()

    def _capture(self, bucket: int) -> tuple[Any, Array]:
        import cupy

        with cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            self._stream.begin_capture()
            output = self._compute(bucket)
            graph = self._stream.end_capture()
        graph.upload(self._stream)
        return graph, _borrowed(output)


def _borrowed(array: Array) -> Array:
    """The same elements without a hold on their memory, which the next capture may use again: the pool keeps it."""
    import cupy

    memory = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, None, array.data.device_id)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0), array.strides)
