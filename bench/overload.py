"""Twice as many requests as the server can take: what becomes of those it accepts, and how fast it refuses the rest.

python -m cupy_engine.bench.overload --seconds 60
python -m cupy_engine.bench.overload --shape llama3-8b --clients 128 --max-num-seqs 64 --device cuda

First the capacity is measured with a closed loop, then latencies at half of it. With targets made of those the server
starts anew and gets half of its capacity and twice of it in turns, so that what else the machine does befalls both
alike: arrivals at random, streamed answers, no retries. Each turn begins on an idle server.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cupy_engine.errors import EngineError

from .http_client import Exchange, post
from .loops import closed_loop, open_loop, quantile
from .option_types import amount, count
from .server_process import ServerProcess
from .twin import common_words, default_vocab_size, random_texts, serve_shape, serve_twin
from .workloads import SHAPES

PROMPT_LEN = 64
Serve = Callable[..., AbstractContextManager[ServerProcess]]
STRETCH = 1.5  # how much longer than uncongested an answer may take
_SETTLED = 0.25  # of a closed loop's time, after which all seats are taken
_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the accepted requests of a run, in milliseconds, and of its refusals.

    ``num_lost``: connections that closed without an answer; ``num_cut_off``: within one. ``other``: statuses.
    """

    num_accepted: int
    num_refused: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    total_p50_ms: float
    total_p99_ms: float
    refusal_p50_ms: float
    refusal_p90_ms: float
    refusal_p99_ms: float
    num_lost: int
    num_cut_off: int
    other: dict[int, int]

    @classmethod
    def of(cls, done: list[Exchange]) -> Latencies:
        accepted = [each for each in done if each.status == 200]
        refused_s = [each.total_s for each in done if each.status == 429]
        tpots_s = [each.tpot_s for each in accepted]
        return cls(
            num_accepted=len(accepted),
            num_refused=len(refused_s),
            ttft_p50_ms=_ms([each.ttft_s for each in accepted], 0.5),
            ttft_p99_ms=_ms([each.ttft_s for each in accepted], 0.99),
            tpot_p50_ms=_ms(tpots_s, 0.5),
            tpot_p99_ms=_ms(tpots_s, 0.99),
            total_p50_ms=_ms([each.total_s for each in accepted], 0.5),
            total_p99_ms=_ms([each.total_s for each in accepted], 0.99),
            refusal_p50_ms=_ms(refused_s, 0.5),
            refusal_p90_ms=_ms(refused_s, 0.9),
            refusal_p99_ms=_ms(refused_s, 0.99),
            num_lost=sum(each.is_lost for each in done),
            num_cut_off=sum(not each.is_whole for each in done if not each.is_lost),
            other=dict(Counter(each.status for each in done if each.status not in (0, 200, 429))),
        )


def _ms(seconds: list[float], share: float) -> float:
    return round(quantile(seconds, share) * 1e3, 1)


class OverloadBench:
    """Requests of one kind against servers with different options.

    Args:
        serve: starts a server; takes its options.
        words: that the prompts are made of.
        num_clients: that measure the capacity.
    """

    def __init__(self, serve: Serve, options: list[str], words: list[str], output_len: int, num_clients: int) -> None:
        self._serve = serve
        self._options = options
        self._num_clients = num_clients
        self._texts = random_texts(words, PROMPT_LEN)
        self._output_len = output_len

    def without_targets(self, seconds: float) -> tuple[float, Latencies]:
        """Requests per second that the server can take, and latencies at half of that.

        Raises:
            EngineError: so short a time shows neither.
        """
        with self._serve(*self._options) as server:
            per_s = self._capacity(server, min(20.0, seconds))
            done = open_loop(server.address, self._requests(), per_s / 2, seconds) if per_s else []
            if not any(each.status == 200 for each in done):
                raise EngineError(f"seconds: no request was answered in {seconds:g} s; give it more")
            return per_s, Latencies.of(done)

    def in_turns(
        self, rates_per_s: Sequence[float], seconds: float, num_turns: int, targets: list[str]
    ) -> tuple[list[Latencies], dict[str, float]]:
        """Latencies at each rate, ``seconds`` of it in so many turns, and what the engine says about its targets."""
        with self._serve(*self._options, *targets) as server:
            self._capacity(server, min(5.0, seconds / 4))  # so that it knows itself
            done: list[list[Exchange]] = [[] for _ in rates_per_s]
            for turn in range(num_turns):
                for exchanges, per_s in zip(done, rates_per_s, strict=True):
                    requests = self._requests()
                    exchanges += open_loop(server.address, requests, per_s, seconds / num_turns, seed=turn)
            names = ("slo_met_total", "slo_missed_total", "admission_rejections_total")
            return list(map(Latencies.of, done)), {name: server.metric(name) for name in names}

    def _capacity(self, server: ServerProcess, seconds: float) -> float:
        """In whole answers, by their tokens: few answers end in a short time, and those together."""
        start_s = time.monotonic()
        requests = self._requests()
        done = closed_loop(server.address, requests, self._num_clients, seconds, start_s=start_s, grace_s=_GRACE_S)
        settled_s, end_s = start_s + _SETTLED * seconds, start_s + seconds
        num_tokens = sum(settled_s <= time_s < end_s for each in done for time_s in each.event_times_s)
        return num_tokens / self._output_len / (end_s - settled_s)

    def _requests(self) -> Iterator[bytes]:
        body: dict[str, Any] = {"stream": True, "max_tokens": self._output_len, "ignore_eos": True}
        for text in self._texts:
            yield post("/v1/completions", {"prompt": text, **body})


def slo_options(calm: Latencies, output_len: int) -> list[str]:
    """Targets made of what an uncongested server does: its p99s, and a pace that lets whole answers be in time."""
    per_token_ms = STRETCH * (calm.total_p99_ms - calm.ttft_p99_ms) / max(1, output_len - 1)
    ttft_s, tpot_s = calm.ttft_p99_ms / 1e3, min(calm.tpot_p99_ms, per_token_ms) / 1e3
    return ["--slo-ttft-s", f"{ttft_s:.4f}", "--slo-tpot-s", f"{tpot_s:.4f}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other options are those of cupy-engine serve.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    served = parser.add_mutually_exclusive_group()
    served.add_argument("-m", "--model", help="what to serve (default: the default model's dummy twin)")
    served.add_argument("--shape", choices=SHAPES, help="serve random weights of this shape")
    parser.add_argument(
        "--seconds", type=amount, default=60.0, help="of overload, and of half the capacity (default: 60)"
    )
    parser.add_argument("--turns", type=count, default=6, help="that these are cut into (default: 6)")
    parser.add_argument("--factor", type=amount, default=2.0, help="offered load over capacity (default: 2)")
    parser.add_argument("--output-len", type=count, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--max-num-seqs", type=count, default=16, help="sequences in a step (default: 16)")
    parser.add_argument("--clients", type=count, default=64, help="that measure the capacity (default: 64)")
    arguments, others = parser.parse_known_args()
    options = ["--workers", "1", "--max-num-seqs", str(arguments.max_num_seqs), *others]
    bench = OverloadBench(_serve(arguments), options, common_words(), arguments.output_len, arguments.clients)
    try:
        return _run(bench, arguments)
    except EngineError as error:
        parser.exit(1, f"error: {error}\n")


def _run(bench: OverloadBench, arguments: argparse.Namespace) -> int:
    per_s, first = bench.without_targets(arguments.seconds / 2)
    _show("capacity", {"requests_per_s": round(per_s, 2)})
    _show("without targets", asdict(first))
    targets = slo_options(first, arguments.output_len)
    rates_per_s = (per_s / 2, per_s * arguments.factor)
    (calm, loaded), metrics = bench.in_turns(rates_per_s, arguments.seconds, arguments.turns, targets)
    _show("uncongested", asdict(calm))
    _show("overloaded", asdict(loaded) | {"targets": targets} | metrics)
    ratios = {name: getattr(loaded, name) / getattr(calm, name) for name in ("ttft_p99_ms", "total_p99_ms")}
    _show("overloaded / uncongested", {name: round(ratio, 2) for name, ratio in ratios.items()})
    return 0


def _serve(arguments: argparse.Namespace) -> Serve:
    if arguments.model:
        return partial(ServerProcess.serve, arguments.model)
    if arguments.shape:
        return partial(serve_shape, arguments.shape, default_vocab_size())
    return serve_twin


def _show(name: str, figures: dict[str, Any]) -> None:
    print(json.dumps({"run": name} | figures), flush=True)


if __name__ == "__main__":
    sys.exit(main())
