"""Where the memory goes, and how much of the KV cache is put to use.

The engine is started and its pool filled with requests of varied length, until sequences must make room for each other.
On a GPU, workspace and graphs are as the engine has planned them, and "GPU, all" is what the card says that the engine
has taken at the end. On the CPU, workspace is what the process held at its peak beyond weights, KV cache and what
Python and its libraries held before.
"""

from __future__ import annotations

import argparse
import resource
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from cupy_engine.server.cli import main

from cupy_engine import Engine, SamplingParams
from cupy_engine.cuda_device import why_no_cuda

from .option_types import count
from .pool_probe import PoolProbe
from .report import Figures, Report, Row, add_output_arguments, check_output, emit
from .setup import BENCH_DEFAULTS, add_engine_arguments, check_room, engine_options

_DEFAULTS = BENCH_DEFAULTS | {"kv_cache_memory_bytes": 256 << 20, "admission_mode": "greedy"}
_OVERFLOW = 1.25  # tokens of all requests, in pools
_FEWEST = 32  # requests that a pool holds unless a length is asked for: few and long ones cannot fill it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench memory``."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--input-len",
        type=count,
        help="mean prompt tokens, from half to one and a half times as many; more where max_num_seqs such requests "
        f"would not fill the cache (default: 1024, or as many as let {_FEWEST} requests fit)",
    )
    group.add_argument("--output-len", type=count, default=128, help="tokens to generate (default: 128)")
    add_engine_arguments(parser, _DEFAULTS)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    check_output(arguments)
    before = _MemoryUse.now()
    with engine_options(arguments, _DEFAULTS) as options, Engine(**options) as engine:
        check_room(engine, 1, arguments.output_len)
        loaded, others_bytes = _MemoryUse.now(), _taken_bytes() - engine.info.used_bytes
        with PoolProbe.watching(engine._core) as probe:
            engine.generate(*_requests(engine, arguments.input_len, arguments.output_len))
        gpu_bytes = _taken_bytes() - others_bytes
        figures = _sizes(engine, before, loaded, _MemoryUse.now(), gpu_bytes) | probe.figures()
        info = engine.info
    name = f"cupy-engine, {info.backend}"
    about = {"model": info.model_name, "backend": info.backend, "num_kv_blocks": info.num_kv_blocks}
    state = "filled up" if probe.num_preemptions else "never full: let more and shorter requests fit, see --input-len"
    title = f"{info.model_name}: {info.num_kv_blocks} blocks of {info.block_size} tokens, {state}"
    emit(Report(title, about, [Row(name, figures)]), arguments)
    return 0


@dataclass(frozen=True, slots=True)
class _MemoryUse:
    """Bytes that this process holds on the host, now and at most so far."""

    host: int
    host_peak: int

    @classmethod
    def now(cls) -> _MemoryUse:
        with open("/proc/self/statm") as file:
            host = int(file.read().split()[1]) * resource.getpagesize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return cls(host, peak)


def _taken_bytes() -> int:
    """Memory of the GPU that anybody has taken; 0 if there is none."""
    if why_no_cuda() is not None:
        return 0
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


def _sizes(engine: Engine, before: _MemoryUse, loaded: _MemoryUse, after: _MemoryUse, gpu_bytes: int) -> Figures:
    info = engine.info
    figures: Figures = {"weight_bytes": info.weight_bytes, "kv_cache_bytes": info.kv_cache_bytes}
    if info.gpu_ids:
        figures |= {"workspace_bytes": info.workspace_bytes, "graph_bytes": info.graph_bytes}
        figures |= {"gpu_bytes": gpu_bytes, "limit_bytes": info.limit_bytes}
    else:
        figures["workspace_bytes"] = after.host_peak - before.host - info.weight_bytes - info.kv_cache_bytes
    return figures | {"host_bytes": loaded.host, "host_peak_bytes": after.host_peak}


def _requests(engine: Engine, mean_len: int | None, output_len: int) -> tuple[list[Any], SamplingParams]:
    """Random prompts, together with what is generated more than the pool holds."""
    info, rng = engine.info, np.random.default_rng(0)
    pool_len = info.num_kv_blocks * info.block_size
    if mean_len is None:
        mean_len = min(1024, max(pool_len // _FEWEST - output_len, 1))
    wanted = int(_OVERFLOW * pool_len)
    fill_len = -(-wanted // engine.config.max_num_seqs) - output_len
    mean_len = min(max(mean_len, fill_len), info.max_model_len - output_len)
    prompts: list[Any] = []
    while wanted > 0:
        half = min(mean_len // 2, info.max_model_len - output_len - mean_len)
        num_tokens = int(rng.integers(mean_len - half, mean_len + half + 1))
        prompts.append(rng.integers(0, engine.frontend.vocab_size, num_tokens).tolist())
        wanted -= num_tokens + output_len
    return prompts, SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)


if __name__ == "__main__":
    sys.exit(main(["bench", "memory", *sys.argv[1:]]))
