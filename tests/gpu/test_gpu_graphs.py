"""Decode attention in a captured graph: lengths, blocks and queries change between replays, addresses do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_problem import Problem
from gpu_arrays import poisoned, relative_error, to_gpu

from cupy_engine.ops.attention import paged_attention

pytestmark = pytest.mark.gpu

TOLERANCE = 1.2e-2


def test_a_replayed_graph_sees_new_lengths_and_blocks(rng: np.random.Generator) -> None:
    import cupy

    longest, num_seqs = 700, 9
    first = Problem(rng, "bfloat16", [1] * num_seqs, [longest] * num_seqs, (8, 2), 128)
    q, k_cache, v_cache = (to_gpu(a) for a in (first.q, first.k_cache, first.v_cache))
    metadata, out = first.metadata(to_gpu), poisoned(first.q.shape, first.q.dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        paged_attention(q, k_cache, v_cache, metadata, first.scale, out=out)
        stream.begin_capture()
        paged_attention(q, k_cache, v_cache, metadata, first.scale, out=out)
        graph = stream.end_capture()
        for _ in range(5):
            first.context_lens[:] = rng.integers(1, longest + 1, num_seqs)
            first.q = rng.permutation(first.q)
            first.block_tables[:] = rng.permutation(first.block_tables)
            uploads: list[tuple[Any, np.ndarray]] = [
                (q, first.q),
                (metadata.context_lens, first.context_lens),
                (metadata.block_tables, first.block_tables),
                (out, np.full(first.q.shape, np.nan, np.float32).astype(first.q.dtype)),
            ]
            for array, values in uploads:
                array.set(values, stream=stream)
            graph.launch(stream)
            stream.synchronize()
            host = (first.q.astype(np.float32), first.k_cache, first.v_cache)
            reference = paged_attention(*host, first.metadata(np.asarray), first.scale)
            assert relative_error(out, reference) < TOLERANCE


def test_streams_have_separate_workspaces(rng: np.random.Generator) -> None:
    import cupy

    problems = [Problem(rng, "bfloat16", [1], [20000], (8, 2), 128) for _ in range(3)]
    arrays = [[to_gpu(a) for a in (p.q, p.k_cache, p.v_cache)] for p in problems]
    metadata = [p.metadata(to_gpu) for p in problems]
    outs = [poisoned(p.q.shape, p.q.dtype) for p in problems]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        for problem, a, m, out, stream in zip(problems, arrays, metadata, outs, streams, strict=True):
            with stream:
                paged_attention(*a, m, problem.scale, out=out)
    cupy.cuda.Device().synchronize()
    for problem, out in zip(problems, outs, strict=True):
        host = (problem.q.astype(np.float32), problem.k_cache, problem.v_cache)
        reference = paged_attention(*host, problem.metadata(np.asarray), problem.scale)
        assert relative_error(out, reference) < TOLERANCE
