"""An engine client that answers at once from a script, so that the HTTP side can be tested alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from cupy_engine.server.deployment import ReplicaStatus
from cupy_engine.server.engine_client import EngineClient
from cupy_engine.server.mailbox import Mailbox
from cupy_engine.server.replica_pool import PooledReplica

from cupy_engine.messages import (
    AbortRequest,
    Command,
    EngineStats,
    GenerateRequest,
    Metric,
    SequenceOutput,
    StatsReply,
    TokenLogprobs,
)
from cupy_engine.overload import EngineLoad

Script = Callable[[GenerateRequest], list[SequenceOutput]]


class FakeEngineClient(EngineClient):
    """Stands in for the real one, and for a pool of one; keeps what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.fake_state = "ready"
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.refusals: list[str] = []
        self.sent: list[Command] = []
        self.replicas = {"e0": PooledReplica("0", self, ReplicaStatus(folder="e0", state="ready"))}
        self._counter = itertools.count(1)

    @property
    def state(self):
        return self.fake_state

    @property
    def is_ready(self):
        return self.fake_state == "ready"

    def connect(self) -> None:
        pass

    def new_request_id(self) -> str:
        return f"fake-{next(self._counter)}"

    def submit(self, requests: Sequence[GenerateRequest]) -> Mailbox:
        self.require_ready()
        mailbox = Mailbox()
        for request in requests:
            self.requests.append(request)
            for output in self.script(request):
                mailbox.put([output])
        return mailbox

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def send(self, commands: Sequence[Command]) -> None:
        self.sent.extend(commands)

    def forget(self, request_ids: Sequence[str]) -> None:
        pass

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)

    status = None
    load = EngineLoad(num_waiting=3, ended_per_s=2.0)

    def stats(self, timeout_s: float = 1.0, *, wants_live: bool = False) -> StatsReply:
        self.require_ready()
        metrics = [Metric("gauge", "fake", "For tests.", {"": 1})]
        return StatsReply(token=1, stats=EngineStats(num_running=2, num_waiting=3), metrics=metrics)


def says(token_ids: Sequence[int], *, finish_reason: str | None = "stop", eos: int | None = None) -> Script:
    """Every sequence says ``token_ids``, one a step, then ``eos`` if given."""

    def script(request: GenerateRequest) -> list[SequenceOutput]:
        said = [*token_ids, *([] if eos is None else [eos])]
        ends = [None] * (len(said) - 1) + [finish_reason]
        return [
            _output(request, index, token_id, step, end)
            for step, (token_id, end) in enumerate(zip(said, ends, strict=True))
            for index in range(request.params.num_sequences)
        ]

    return script


def fails(kind: str, message: str = "no") -> Script:
    """Every request fails."""
    return lambda request: [
        SequenceOutput(request_id=request.request_id, finish_reason="error", error=message, error_kind=kind)
    ]


def _output(request: GenerateRequest, index: int, token_id: int, step: int, finish: str | None) -> SequenceOutput:
    params = request.params
    logprobs = [] if params.logprobs is None else [_logprobs(token_id, params.logprobs)]
    prompt_logprobs = None
    if params.prompt_logprobs is not None and step == index == 0:
        rest = [_logprobs(each, params.prompt_logprobs) for each in request.prompt_token_ids[1:]]
        prompt_logprobs = [None, *rest]
    return SequenceOutput(
        request_id=request.request_id,
        index=index,
        token_ids=[token_id],
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=1 if step == 0 else 0,
        finish_reason=finish,
    )


def _logprobs(token_id: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, [(token_id + k, -0.5 - k) for k in range(count)])


def aborted_indexes(client: FakeEngineClient) -> list[int | None]:
    """Sequences that were asked to stop."""
    return [command.index for command in client.sent if isinstance(command, AbortRequest)]
