"""Requests of every kind, good and bad, leave nothing behind. The long version is ``cupy_engine.bench.soak``."""

from __future__ import annotations

from cupy_engine.bench.soak import NUM_CLIENTS, SERVER_OPTIONS, Soak
from cupy_engine.bench.twin import common_words, serve_twin


def test_nothing_is_left_of_a_thousand_requests() -> None:
    with serve_twin(*SERVER_OPTIONS, "--workers", "1") as server:
        soak = Soak(server, common_words(), seed=1)
        first = soak.run(300)
        last = soak.run(700)
    assert first.is_idle, "no request and no block is left"
    assert last.is_idle, "no request and no block is left"
    assert soak.outcomes.keys() <= {"200", "400", "404", "431", "504", "left", "0"}, soak.outcomes
    assert soak.outcomes["200"] > 300
    assert first.engine.num_threads > 0, "the engine was looked at"
    assert last.workers.num_descriptors <= first.workers.num_descriptors + 2
    assert last.engine.num_descriptors <= first.engine.num_descriptors
    assert last.workers.num_threads <= first.workers.num_threads + NUM_CLIENTS, "no thread per request"
    assert last.engine.num_threads == first.engine.num_threads
    assert last.engine.rss_bytes - first.engine.rss_bytes < 8 << 20
    assert last.workers.rss_bytes - first.workers.rss_bytes < 24 << 20
