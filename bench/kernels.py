"""The GPU kernels beside their limits: GB/s beside a device copy, TFLOP/s beside a large cuBLASLt product.

    python -m cupy_engine.bench.kernels [--only decode prefill] [--no-hopper] [--json]

Every case runs over several sets of inputs, together larger than the L2 cache, as one captured graph, in which launches
overlap as in a step; the time is the median over replays between two events.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial

import numpy as np
from cupy_engine.server.cli import main

from cupy_engine.cuda_device import why_no_cuda
from cupy_engine.errors import EngineError
from cupy_engine.ops import _cuda_attention, _gated_gemm, _skinny_gemm
from cupy_engine.ops._gemm_tuning import fastest
from cupy_engine.ops.kv_cache import copy_blocks

from .kernel_cases import BLOCK_SIZE, FAMILIES, Launch, product_shape, random

_NUM_WARM_UPS, _NUM_REPLAYS = 5, 20
_DEVICE_TO_DEVICE = 3  # cudaMemcpyKind


@dataclass(frozen=True)
class Result:
    """One measured case; ``rate`` and ``limit`` are in ``unit``."""

    name: str
    case: str
    time_us: float
    rate: float
    limit: float
    unit: str


def time_s(launches: list[Launch]) -> float:
    """Median seconds per launch."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for launch in launches:
            launch()
        stream.synchronize()
        stream.begin_capture()
        for launch in launches:
            launch()
        graph = stream.end_capture()
        for _ in range(_NUM_WARM_UPS):
            graph.launch(stream)
        marks = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(_NUM_REPLAYS)]
        for begin, end in marks:
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
        stream.synchronize()
    times_ms = [float(cupy.cuda.get_elapsed_time(begin, end)) for begin, end in marks]
    return statistics.median(times_ms) / 1e3 / len(launches)


def copy_limit() -> float:
    """GB/s of a device-to-device copy, read and written bytes: the driver's or a kernel's, whichever is faster."""
    import cupy

    target, source = (random(1, 1, 1 << 16, BLOCK_SIZE, 4, 128) for _ in range(2))
    pairs = cupy.asarray(np.repeat(np.arange(1 << 16, dtype=np.int32), 2).reshape(-1, 2))
    seconds = [time_s([partial(copy_blocks, source, target, pairs)])]
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    for _ in range(_NUM_REPLAYS):
        begin.record()
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, _DEVICE_TO_DEVICE, 0)
        end.record()
        end.synchronize()
        seconds.append(float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3)
    return 2 * int(source.nbytes) / min(seconds) / 1e9


def product_limit() -> float:
    """TFLOP/s of cuBLASLt, bfloat16, 8192 x 8192 x 8192."""
    x, weight, out = (random(8192, 8192) for _ in range(3))
    best = fastest(product_shape(x, weight, out), [weight])
    return 2 * 8192**3 / time_s([partial(best.run, x, weight, None, out)]) / 1e12


def measure(families: list[str]) -> Iterator[Result]:
    """Measure the limits, then every case of the families."""
    limits = {"TFLOP/s": product_limit(), "GB/s": copy_limit()}  # the product first: it wakes the clocks
    for family in families:
        for case in FAMILIES[family]():
            seconds = time_s(case.launches)
            unit = "TFLOP/s" if case.num_flops else "GB/s"
            rate = case.num_flops / 1e12 if case.num_flops else case.num_bytes / 1e9
            yield Result(case.name, case.case, seconds * 1e6, rate / seconds, limits[unit], unit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench kernels``."""
    parser.add_argument(
        "--only", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES), help="families to measure"
    )
    parser.add_argument("--no-hopper", action="store_true", help="measure the kernels for GPUs before Hopper")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    reason = why_no_cuda()
    if reason is not None:
        raise EngineError(f"kernels are measured on a GPU: {reason}")
    import cupy

    if arguments.no_hopper:
        for module in (_cuda_attention, _gated_gemm, _skinny_gemm):
            module.is_hopper = lambda: False  # type: ignore[attr-defined]
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    header = {"gpu": gpu, "date": date.today().isoformat(), "cupy": cupy.__version__}
    results = measure(arguments.only)
    if arguments.json:
        print(json.dumps({**header, "results": [asdict(result) for result in results]}, indent=1))
        return 0
    print(", ".join(header.values()))
    for r in results:
        rate = f"{r.rate:8.0f} {r.unit:7} {r.rate / r.limit:6.1%} of {r.limit:.0f}"
        print(f"{r.name:18} {r.case:38} {r.time_us:10.1f} us {rate}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
