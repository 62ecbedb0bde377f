"""Steps as CUDA graphs: captured once per bucket of sizes, replayed with one launch.

A captured graph repeats the same launches on the same addresses. So a step's integers arrive in buffers that never
move, everything the graph allocates comes from a memory pool of its own, and steps are padded to the next bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

from cupy_engine.device import Array

Key = TypeVar("Key", bound=Hashable)


def batch_buckets(max_batch: int) -> list[int]:
    """Batch sizes of decode steps: 1, 2, 4, every 8 up to 64, every 16 up to 256, every 32 beyond, and the largest."""
    return _up_to(max_batch, [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 1, 32)])


def token_buckets(max_tokens: int) -> list[int]:
    """Tokens of steps with prompts: 32, 64, every 128 up to 1024, every 256 beyond, and the largest."""
    return _up_to(max_tokens, [32, 64, *range(128, 1024, 128), *range(1024, max_tokens + 1, 256)])


def _up_to(largest: int, sizes: list[int]) -> list[int]:
    return sorted({size for size in sizes if size < largest} | {largest})


class GraphSet(Generic[Key]):
    """Graphs of one computation by what they were captured for.

    Args:
        stream: where graphs are captured and run.
        prepare: puts harmless inputs for a key where the computation reads them.
        compute: enqueues the computation for a key and returns its output.
    """

    def __init__(self, stream: Any, prepare: Callable[[Key], None], compute: Callable[[Key], Array]) -> None:
        import cupy

        self._stream = stream
        self._prepare = prepare
        self._compute = compute
        self._pool = cupy.cuda.MemoryPool()
        self._graphs: dict[Key, tuple[Any, Array]] = {}

    @property
    def pool_bytes(self) -> int:
        """Memory for intermediate arrays of the graphs, or of the largest of them."""
        return int(self._pool.total_bytes())

    def warm_up(self, keys: Iterable[Key]) -> None:
        """Compute for every key: compiling and timing GEMM algorithms may not be captured. Largest first, see below."""
        for key in keys:
            self._run_eagerly(key)

    def capture(self, keys: Iterable[Key]) -> None:
        """Capture a graph per key, in place of what was captured before; they share their memory, so largest first."""
        self._graphs.clear()
        for key in keys:
            self._graphs[key] = self._capture(key)

    def launch(self, key: Key) -> Array:
        """Replay a key's graph; returns its output, valid until the next launch of any."""
        graph, output = self._graphs[key]
        graph.launch(self._stream)
        return output

    def _run_eagerly(self, key: Key) -> None:
        import cupy

        with cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            self._prepare(key)
            self._compute(key)
        self._stream.synchronize()

    def _capture(self, key: Key) -> tuple[Any, Array]:
        import cupy

        with cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            self._stream.begin_capture()
            output = self._compute(key)
            graph = self._stream.end_capture()
        graph.upload(self._stream)
        return graph, _borrowed(output)


def _borrowed(array: Array) -> Array:
    """The same elements without a hold on their memory, which the next capture may use again: the pool keeps it."""
    import cupy

    memory = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, None, array.data.device_id)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0), array.strides)
