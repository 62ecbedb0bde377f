"""In which order requests are served: first come first served, or by priority with ageing."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator
from typing import Protocol

from cupy_engine.request import Request, Sequence

OrderKey = tuple[float, float, int, int]


class Policy(Protocol):
    """Smaller keys run earlier and are preempted later. A key never changes, so queues need no re-sorting."""

    def key(self, sequence: Sequence) -> OrderKey: ...

    def may_displace(self, candidate: Request, running: Request) -> bool:
        """Whether a waiting request may push a running one out."""


class FcfsPolicy:
    """First come, first served. Nobody waits behind a later arrival, so nobody starves."""

    def key(self, sequence: Sequence) -> OrderKey:
        return (0.0, sequence.request.arrival_time_s, sequence.sequence_id, sequence.index)

    def may_displace(self, candidate: Request, running: Request) -> bool:
        return False


class PriorityPolicy:
    """Lower priority values first, with ageing.

    A request of priority p that has waited w seconds counts as p - w / ageing_s. As all age at the same rate, comparing
    p + arrival / ageing_s gives the same order at every moment; and as every later arrival adds to it, only a bounded
    number of requests can ever overtake a given one: nobody starves.
    """

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s

    def key(self, sequence: Sequence) -> OrderKey:
        request = sequence.request
        return (self._aged(request), request.arrival_time_s, sequence.sequence_id, sequence.index)

    def may_displace(self, candidate: Request, running: Request) -> bool:
        return candidate.priority < running.priority and self._aged(candidate) < self._aged(running)

    def _aged(self, request: Request) -> float:
        return request.priority + request.arrival_time_s / self._ageing_s


class WaitingQueue:
    """Sequences that wait for a seat, in the policy's order. Removal leaves a dead entry that is skipped later."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[OrderKey, Sequence]] = []
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, sequence in sorted(self._heap) if sequence.sequence_id in self._members)

    def push(self, sequence: Sequence) -> None:
        assert sequence.sequence_id not in self._members, f"sequence {sequence.sequence_id} waits already"
        heapq.heappush(self._heap, (self._policy.key(sequence), sequence))
        self._members.add(sequence.sequence_id)

    def peek(self) -> Sequence | None:
        while self._heap and self._heap[0][1].sequence_id not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        sequence = self.peek()
        assert sequence is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        self._members.discard(sequence.sequence_id)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self._members.discard(sequence.sequence_id)


class DeadlineQueue:
    """Request ids by the time at which they must have ended; those that end earlier stay in until swept out."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, deadline_s: float, request_id: str) -> None:
        heapq.heappush(self._heap, (deadline_s, request_id))

    def sweep(self, live: Container[str]) -> None:
        """Drop the ids that are not in ``live``."""
        self._heap = [entry for entry in self._heap if entry[1] in live]
        heapq.heapify(self._heap)

    def pop_passed(self, now_s: float) -> list[str]:
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            passed.append(heapq.heappop(self._heap)[1])
        return passed
