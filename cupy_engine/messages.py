"""What travels between a front end and the engine core: typed records that msgspec can put on a wire.

front end ──  GenerateRequest, AbortRequest, StatsRequest, RefusalReport  ──▶  core loop
front end ◀──  SequenceOutput, StatsReply  ───────────────────────────────────  core loop
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cupy_engine.sampling_params import SamplingParams
from cupy_engine.structured_outputs import Grammar

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["mean", "last"]
ErrorKind = Literal["invalid", "queue_full", "slo_ttft", "deadline", "internal", "dead"]


class GenerateRequest(msgspec.Struct, kw_only=True, omit_defaults=True, tag="generate"):
    """A prompt to continue, or with ``pooling`` to make one vector of. Text is the front end's affair: the core
    sees token ids only.

    ``request_id`` is unique among live requests. ``priority``: lower runs earlier. ``cache_salt`` separates prefix
    caches. ``arrival_time_s`` and ``deadline_s`` are on the host's monotonic clock, which all its processes share.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    bad_words_token_ids: list[list[int]] = []
    grammar: Grammar | None = None
    pooling: Pooling | None = None
    priority: int = 0
    cache_salt: str = ""
    arrival_time_s: float = 0.0
    deadline_s: float | None = None


class AbortRequest(msgspec.Struct, kw_only=True, omit_defaults=True, tag="abort"):
    """Stop a request, or only its sequence ``index`` (a stop string was found, say). Unknown ids are ignored.

    No output follows for what was aborted.
    """

    request_id: str
    index: int | None = None


class StatsRequest(msgspec.Struct, kw_only=True, omit_defaults=True, tag="stats"):
    """Ask for a :class:`StatsReply`; ``token`` comes back in it, and ``live`` if ``wants_live``."""

    token: int
    wants_live: bool = False


class RefusalReport(msgspec.Struct, kw_only=True, tag="refusals"):
    """Requests that a front end has turned away by itself, by reason, for the engine's metrics."""

    num_by_reason: dict[str, int]


Command = GenerateRequest | AbortRequest | StatsRequest | RefusalReport


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Natural-log probabilities at one position, from the model's raw logits (before penalties and temperature).

    ``rank`` is the chosen token's, 1 for the most likely. ``top`` holds (token id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class SequenceOutput(msgspec.Struct, kw_only=True, omit_defaults=True, tag="output", gc=False):
    """What one step added to sequence ``index`` of a request.

    ``prompt_logprobs`` comes once, with sequence 0's first output: one entry per prompt token, ``None`` for the first.
    ``num_cached_tokens`` (prompt tokens found in the prefix cache) and ``scheduled_time_s`` (when the request left the
    queue, monotonic) likewise.
    ``embedding``: [H] float32, the hidden states after the last norm, pooled; it comes once, with no tokens.
    ``stop_reason``: the stop token id that ended the sequence, if it was not the end-of-sequence token.
    With ``finish_reason == "error"``, ``error`` and ``error_kind`` say why and ``index`` stands for all sequences.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    scheduled_time_s: float | None = None
    embedding: bytes | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    error_param: str | None = None
    retry_after_s: float | None = None


class EngineStats(msgspec.Struct, kw_only=True):
    """A snapshot of the core. Counters run from the start of the engine."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_kv_blocks: int = 0
    num_free_kv_blocks: int = 0
    num_prefix_queries_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions_recompute: int = 0
    num_preemptions_swap: int = 0


class HistogramCounts(msgspec.Struct, array_like=True):
    """Observations up to each of ``bounds``, not cumulative; the last of ``counts`` is those beyond all bounds."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float


class Metric(msgspec.Struct, array_like=True):
    """A metric at one moment: ``values`` by the value of ``label`` ("" where it has none), or a histogram."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    text: str
    values: dict[str, float] = {}
    label: str = ""
    histogram: HistogramCounts | None = None


class LiveSequence(msgspec.Struct, array_like=True):
    """How far a running sequence is, in tokens: its prompt, what has been generated, what has its KV computed."""

    num_prompt: int
    num_output: int
    num_computed: int


class LiveView(msgspec.Struct, kw_only=True):
    """What the engine looks like at one moment, for people to watch.

    ``blocks``: one character per KV block, ``.`` empty, ``c`` free but cached, a digit how many sequences use it (9: or
    more). Of a large pool it shows every ``blocks_step``-th block. ``sequences``: the first that run.
    """

    blocks: str
    blocks_step: int
    sequences: list[LiveSequence]
    num_prefilling: int


class StatsReply(msgspec.Struct, kw_only=True, tag="stats"):
    """The answer to :class:`StatsRequest`."""

    token: int
    stats: EngineStats
    metrics: list[Metric] = []
    live: LiveView | None = None


Reply = SequenceOutput | StatsReply
