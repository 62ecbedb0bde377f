"""What the engine counts, under vLLM's names.

Counting happens in every step, so it is a list increment. Whoever asks gets a snapshot; rendering it for Prometheus is
the asker's work (``server/metrics_page.py``), so that it costs the engine's loop no time.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from cupy_engine.adaptive_limit import AdaptiveLimit
from cupy_engine.messages import EngineStats, HistogramCounts, Metric
from cupy_engine.overload import Overruns
from cupy_engine.request import Request, Sequence
from cupy_engine.scheduler_listener import PreemptionKind, SchedulerListener

if TYPE_CHECKING:
    from cupy_engine.scheduler import Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_SMALL = (1, 2, 4, 8, 16)


class Histogram:
    """Counts per bucket; the last one is +Inf."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def snapshot(self) -> HistogramCounts:
        return HistogramCounts(self._bounds, self._counts.copy(), self._sum)


class EngineMetrics(SchedulerListener):
    """Counters and histograms of one engine since its start.

    Args:
        slo_ttft_s, slo_tpot_s: targets of which it is counted how many requests meet them.
        limit: learns from the first tokens of those who found a seat.
    """

    def __init__(
        self,
        slo_ttft_s: float | None = None,
        slo_tpot_s: float | None = None,
        limit: AdaptiveLimit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._targets_s = {"ttft": slo_ttft_s, "tpot": slo_tpot_s}
        self._met: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self.overruns = Overruns(slo_ttft_s)
        self._limit = limit
        self._prefill_s = 0.0  # from the queue to the first token: a moving average
        self._clock = clock
        self._counters: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._preemptions: Counter[str] = Counter()
        self._rejections: Counter[str] = Counter()
        self._histograms = {name: Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}

    # What happens

    def on_admitted(self, request: Request) -> None:
        request.first_scheduled_time_s = now_s = self._clock()
        self._histograms["request_queue_time_seconds"].observe(now_s - request.arrival_time_s)
        self._counters["prompt_tokens"] += request.num_prompt_tokens
        self._counters["prompt_tokens_cached"] += request.num_cached_tokens
        self._counters["prefix_cache_queries"] += request.num_prompt_tokens
        self._counters["prefix_cache_hits"] += request.num_cached_tokens
        self._histograms["request_prompt_tokens"].observe(request.num_prompt_tokens)
        self._histograms["request_params_n"].observe(request.params.n)
        if request.params.max_tokens is not None:
            self._histograms["request_params_max_tokens"].observe(request.params.max_tokens)

    def on_preempted(self, how: PreemptionKind) -> None:
        self._preemptions[how] += 1

    def on_draft(self, num_tokens: int, num_accepted: int) -> None:
        self._counters["spec_decode_num_drafts"] += 1
        self._counters["spec_decode_num_draft_tokens"] += num_tokens
        self._counters["spec_decode_num_accepted_tokens"] += num_accepted

    def on_tokens(self, sequences: list[Sequence]) -> None:
        now_s = self._clock()
        self._counters["generation_tokens"] += len(sequences)
        num_since = Counter([sequence.last_token_time_s for sequence in sequences])  # most drew in the same step
        for previous_s, count in num_since.items():
            if previous_s is not None:
                self._histograms["inter_token_latency_seconds"].observe(now_s - previous_s, count)
        for sequence in sequences:
            if sequence.last_token_time_s is None and sequence.request.first_token_time_s is None:
                self._on_first_token(sequence.request, now_s)
            sequence.last_token_time_s = now_s

    def _on_first_token(self, request: Request, now_s: float) -> None:
        request.first_token_time_s = now_s
        ttft_s = now_s - request.arrival_time_s
        self._histograms["time_to_first_token_seconds"].observe(ttft_s)
        self._judge("ttft", ttft_s)
        if request.first_scheduled_time_s is not None:
            prefill_s = now_s - request.first_scheduled_time_s
            self._histograms["request_prefill_time_seconds"].observe(prefill_s)
            self._prefill_s += _WEIGHT_OF_NEW * (prefill_s - self._prefill_s)
        if request.expected_wait_s:
            self.overruns.observe(now_s, ttft_s - request.expected_wait_s)
        elif self._limit is not None:
            self._limit.observe(ttft_s)

    def on_finished(self, sequence: Sequence) -> None:
        request = sequence.request
        if not request.is_finished:
            return
        now_s, num_output = self._clock(), len(sequence.token_ids) - sequence.num_prompt_tokens
        self._finished[request.sequences[0].finish_reason or "error"] += 1
        self._histograms["e2e_request_latency_seconds"].observe(now_s - request.arrival_time_s)
        num_generated = sum(len(each.token_ids) - each.num_prompt_tokens for each in request.sequences)
        self._histograms["request_generation_tokens"].observe(num_generated)
        if request.first_token_time_s is None and request.sequences[0].finish_reason == "error":
            self._judge("ttft", math.inf)
        elif request.first_token_time_s is not None:
            decode_s = now_s - request.first_token_time_s
            self._histograms["request_decode_time_seconds"].observe(decode_s)
            if num_output > 1:
                self._histograms["request_time_per_output_token_seconds"].observe(decode_s / (num_output - 1))
                self._judge("tpot", decode_s / (num_output - 1))

    def _judge(self, target: str, seconds: float) -> None:
        limit_s = self._targets_s[target]
        if limit_s is not None:
            (self._met if seconds <= limit_s else self._missed)[target] += 1

    def on_step(self, num_tokens: int, duration_s: float, host_overhead_s: float) -> None:
        """A step computed ``num_tokens``; of ``duration_s`` it spent ``host_overhead_s`` outside the worker."""
        self._counters["steps"] += 1
        self._histograms["iteration_tokens_total"].observe(num_tokens)
        self._histograms["step_duration_seconds"].observe(duration_s)
        self._histograms["host_overhead_seconds"].observe(host_overhead_s)

    def on_rejected(self, reason: str, count: int = 1) -> None:
        self._rejections[reason] += count

    def on_deadline_exceeded(self) -> None:
        self._counters["deadline_exceeded"] += 1

    # What is read

    @property
    def num_ended(self) -> int:
        """Requests that have ended, however they did."""
        return sum(self._finished.values())

    @property
    def overrun_s(self) -> float:
        """How late a first token may be after the wait that is expected; until that is known, what a prompt takes."""
        return max(self._prefill_s, self.overruns.high_s)

    def stats(self, scheduler: Scheduler) -> EngineStats:
        manager = scheduler.block_manager
        return EngineStats(
            num_steps=self._counters["steps"],
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_swapped=scheduler.num_swapped,
            num_kv_blocks=manager.num_blocks,
            num_free_kv_blocks=manager.num_free_blocks,
            num_prefix_queries_tokens=self._counters["prefix_cache_queries"],
            num_prefix_hit_tokens=self._counters["prefix_cache_hits"],
            num_preemptions_recompute=self._preemptions["recompute"],
            num_preemptions_swap=self._preemptions["swap"],
        )

    def snapshot(self, scheduler: Scheduler) -> list[Metric]:
        """Everything for ``/metrics``, in the page's order."""
        histograms = ((name, text, self._histograms[name].snapshot()) for name, (_, text) in _HISTOGRAMS.items())
        return [
            *self._gauges(scheduler),
            *(Metric("counter", name, text, {"": self._counters[name]}) for name, text in _COUNTERS.items()),
            *self._labelled(),
            *(Metric("histogram", name, text, histogram=counts) for name, text, counts in histograms),
        ]

    def _gauges(self, scheduler: Scheduler) -> list[Metric]:
        stats = self.stats(scheduler)
        usage = 1 - stats.num_free_kv_blocks / stats.num_kv_blocks
        values = (
            ("num_requests_running", "Sequences that run.", stats.num_running),
            ("num_requests_waiting", "Sequences that wait.", stats.num_waiting),
            ("num_requests_running_limit", "Sequences that may run, by seats and targets.", scheduler.seats.max_taken),
            ("num_requests_swapped", "Waiting sequences whose KV is on the host.", stats.num_swapped),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1; cached but free blocks are free.", usage),
        )
        return [Metric("gauge", name, text, {"": value}) for name, text, value in values]

    def _labelled(self) -> list[Metric]:
        """Counters with a label of their own; values that are known are there from the start, at zero."""
        known = (
            ("num_preemptions", "Preemptions.", "by", self._preemptions, ("recompute", "swap")),
            ("request_success", "Ended requests.", "finished_reason", self._finished, _FINISH_REASONS),
            ("admission_rejections", "Refused requests.", "reason", self._rejections, _REJECTIONS),
            ("slo_met", "Requests that met a target.", "target", self._met, _TARGETS),
            ("slo_missed", "Requests that did not.", "target", self._missed, _TARGETS),
        )
        return [
            Metric("counter", name, text, dict.fromkeys(values, 0.0) | counts, label)
            for name, text, label, counts, values in known
        ]


_WEIGHT_OF_NEW = 0.1
_REJECTIONS = ("queue_full", "slo_ttft", "key_limit", "invalid")
_TARGETS = ("ttft", "tpot")
_FINISH_REASONS = ("stop", "length", "abort", "error")

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "prompt_tokens_cached": "Prompt tokens that were found in the prefix cache.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "deadline_exceeded": "Requests ended by their deadline.",
    "spec_decode_num_drafts": "Drafts proposed by speculative decoding.",
    "spec_decode_num_draft_tokens": "Tokens in these drafts.",
    "spec_decode_num_accepted_tokens": "Draft tokens that the model accepted.",
}

_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_SECONDS, "From arrival to the first token."),
    "inter_token_latency_seconds": (_SECONDS, "Between two tokens of a sequence."),
    "request_time_per_output_token_seconds": (_SECONDS, "Mean time per token after the first, per request."),
    "e2e_request_latency_seconds": (_SECONDS, "From arrival to the last token."),
    "request_queue_time_seconds": (_SECONDS, "From arrival to the first step."),
    "request_prefill_time_seconds": (_SECONDS, "From the first step to the first token."),
    "request_decode_time_seconds": (_SECONDS, "From the first to the last token."),
    "request_prompt_tokens": (_TOKENS, "Prompt tokens per request."),
    "request_generation_tokens": (_TOKENS, "Generated tokens per request."),
    "request_params_n": (_SMALL, "Completions asked for."),
    "request_params_max_tokens": (_TOKENS, "max_tokens asked for."),
    "iteration_tokens_total": (_TOKENS, "Tokens computed per step."),
    "step_duration_seconds": (_SECONDS, "Duration of a step."),
    "host_overhead_seconds": (_SECONDS, "Part of a step spent outside the worker: scheduling and bookkeeping."),
}
