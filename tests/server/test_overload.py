"""A server with more requests than it can take serves some in time and refuses the rest at once."""

from __future__ import annotations

from itertools import chain

from cupy_engine.bench.http_client import post
from cupy_engine.bench.loops import open_loop, quantile
from cupy_engine.bench.twin import common_words, random_texts, serve_twin

TTFT_S = 0.5
BODY = {"stream": True, "max_tokens": 100, "ignore_eos": True}


def test_who_is_accepted_is_served_in_time_and_the_rest_is_refused_at_once() -> None:
    texts = random_texts(common_words(), 32)
    requests = (post("/v1/completions", {"prompt": text, **BODY}) for text in texts)
    options = ("--workers", "1", "--max-num-seqs", "2", "--slo-ttft-s", str(TTFT_S), "--slo-tpot-s", "0.1")
    with serve_twin(*options) as server:
        open_loop(server.address, requests, per_s=50, duration_s=1)  # so that it knows its pace
        done = open_loop(server.address, requests, per_s=100, duration_s=4)
        assert server.metric("slo_met_total") > 0
        assert server.metric("admission_rejections_total") > 0
        assert server.is_idle()
    accepted = [each for each in done if each.status == 200]
    refused = [each for each in done if each.status == 429]
    assert len(accepted) + len(refused) == len(done), "no connection closes without an answer"
    assert all(each.is_whole for each in done)
    assert len(accepted) >= 10
    assert len(refused) >= 50
    ttfts_s = [each.ttft_s for each in accepted]
    assert quantile(ttfts_s, 0.5) < 2 * TTFT_S
    assert quantile(ttfts_s, 0.95) < 6 * TTFT_S, "a queue without a rule would be twenty seconds long by then"
    assert quantile([each.total_s for each in refused], 0.5) < 0.05
    assert max(chain.from_iterable(each.gaps_s() for each in accepted)) < 5, "no stream is starved"
