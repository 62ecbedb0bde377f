"""What an observer of the scheduler hears; metrics are made of it."""

from __future__ import annotations

from typing import Literal

from cupy_engine.request import Request, Sequence

PreemptionKind = Literal["recompute", "swap"]


class SchedulerListener:
    """Hears everything and does nothing: the base of real listeners."""

    def on_admitted(self, request: Request) -> None:
        """A request left the queue for the first time; ``request.num_cached_tokens`` is set."""

    def on_preempted(self, how: PreemptionKind) -> None: ...

    def on_draft(self, num_tokens: int, num_accepted: int) -> None:
        """A proposer drafted ``num_tokens``, of which the model took ``num_accepted``."""

    def on_tokens(self, sequences: list[Sequence]) -> None:
        """Each has drawn a token in one step, the last of its ``token_ids``."""

    def on_finished(self, sequence: Sequence) -> None:
        """``sequence.finish_reason`` says why."""
