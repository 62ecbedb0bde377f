"""How full the KV pool gets before anybody must make room, and how much of it is the empty ends of last blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean

from cupy_engine.core import EngineCore
from cupy_engine.plan import StepPlan
from cupy_engine.scheduler import Scheduler
from cupy_engine.scheduler_listener import PreemptionKind

from .replaced import replaced
from .report import Figures


class PoolProbe:
    """Looks at the pool after every step is planned, until the first preemption."""

    def __init__(self) -> None:
        self._used: list[float] = []  # share of the blocks
        self._waste: list[float] = []  # share of the places in used blocks
        self.num_preemptions = 0

    @classmethod
    @contextmanager
    def watching(cls, core: EngineCore) -> Iterator[PoolProbe]:
        """A probe in the core's scheduler, as long as the context lasts."""
        probe, scheduler, metrics = cls(), core.scheduler, core.metrics
        schedule, count = scheduler.schedule, metrics.on_preempted

        def probed_schedule() -> StepPlan | None:
            plan = schedule()
            if not probe.num_preemptions:
                probe._look(scheduler)
            return plan

        def on_preempted(how: PreemptionKind) -> None:
            count(how)
            probe.num_preemptions += 1

        with replaced(scheduler, "schedule", probed_schedule), replaced(metrics, "on_preempted", on_preempted):
            yield probe

    def _look(self, scheduler: Scheduler) -> None:
        manager = scheduler.block_manager
        self._used.append(1 - manager.num_free_blocks / manager.num_blocks)
        for sequence in scheduler.running:
            manager.advance(sequence.sequence_id, sequence.num_computed_tokens)
        self._waste.append(manager.waste())

    def figures(self) -> Figures:
        """Blocks in use, and places of the pool with a token in them, at their highest; mean waste meanwhile."""
        filled = [used * (1 - waste) for used, waste in zip(self._used, self._waste, strict=True)]
        return {
            "kv_blocks_used": max(self._used),
            "kv_places_filled": max(filled),
            "kv_waste": mean(waste for used, waste in zip(self._used, self._waste, strict=True) if used),
            "num_preemptions": self.num_preemptions,
        }
