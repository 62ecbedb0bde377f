"""The benchmark of prefix affinity leads its conversations to their ends and counts right."""

from __future__ import annotations

from argparse import Namespace

from cupy_engine.bench.prefix_affinity import ANSWER_LEN, QUESTION_LEN, SYSTEM_LEN, Talks
from cupy_engine.bench.twin import serve_twin


def test_conversations() -> None:
    with serve_twin("--workers", "1", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 26)) as server:
        tally = Talks([server.address], Namespace(conversations=3, turns=2, systems=1)).run(2)
    first = SYSTEM_LEN + QUESTION_LEN
    assert len(tally.latencies_s) == 6
    assert tally.num_prompt_tokens == 3 * (first + first + ANSWER_LEN + QUESTION_LEN)
    assert 4 * SYSTEM_LEN <= tally.num_cached_tokens < tally.num_prompt_tokens
