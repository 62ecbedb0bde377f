"""All engine processes of a server: what is served, what is being loaded, and what is leaving."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from .deployment import (
    Deployment,
    LoadRequest,
    Outcome,
    Roster,
    SupervisorCommand,
    SupervisorPlan,
    UnloadRequest,
)
from .replica import Replica
from .replica_group import ReplicaGroup

logger = logging.getLogger(__name__)


PLAN_FILE = "plan.json"
FAREWELL_S = 0.5  # for workers to learn that an engine leaves, and for what they have just sent it to arrive


@dataclass(frozen=True, slots=True)
class _Job:
    """A command that is being carried out on ``group``."""

    sender: bytes
    command: LoadRequest | UnloadRequest
    group: ReplicaGroup


class Fleet:
    """Groups of replicas by deployment id, as ``FOLDER/plan.json`` says at first and as commands change it.

    What is loaded starts beside what is served and takes over when it is ready; what is unloaded takes no more requests
    and finishes those it has: nobody else notices.

    ``fatal_error``: why a deployment of the first plan cannot be loaded.
    """

    def __init__(self, folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._folder = folder
        self._plan = msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=SupervisorPlan)
        self._context = context
        self._self_pidfd = os.pidfd_open(os.getpid())
        self._serials = itertools.count()
        self._served = {each.id: ReplicaGroup(each, self._make_replica) for each in self._plan.deployments}
        if self._plan.was_served:
            for group in self._served.values():
                group.take_over()
        self._arriving: dict[str, ReplicaGroup] = {}
        self._leaving: list[ReplicaGroup] = []
        self._farewells: list[tuple[float, ReplicaGroup]] = []  # who is to be stopped when
        self._jobs: list[_Job] = []
        self._outcomes: list[tuple[bytes, Outcome]] = []
        self.is_ending = False
        self.fatal_error: str | None = None

    @property
    def roster(self) -> Roster:
        return Roster(supervisor=os.getpid(), models=[group.status for group in self._served.values()])

    @property
    def is_steady(self) -> bool:
        """Whether every engine is ready, so that nothing is waited for."""
        return all(replica.status.state == "ready" for replica in self._all_replicas())

    @property
    def is_over(self) -> bool:
        return self.is_ending and all(group.is_over for group in self._all_groups())

    def pidfds(self) -> list[int]:
        """Descriptors that become readable when an engine process ends."""
        return [replica.pidfd for replica in self._all_replicas() if replica.pidfd is not None]

    def take_outcomes(self) -> list[tuple[bytes, Outcome]]:
        """What has become of commands, each with its sender."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def carry_out(self, sender: bytes, command: SupervisorCommand) -> None:
        """Begin to; the outcome comes later."""
        match command:
            case LoadRequest():
                group = self._load(command.deployment)
            case UnloadRequest():
                group = self._unload(command.deployment_id)
            case _:
                return
        if isinstance(group, ReplicaGroup):
            self._jobs.append(_Job(sender, command, group))
        else:
            self._outcomes.append((sender, Outcome(command.token, group)))

    def tick(self, elapsed_s: float) -> None:
        """Look after all processes and all jobs."""
        for group in self._all_groups():
            group.tick(elapsed_s)
        while self._farewells and time.monotonic() >= self._farewells[0][0]:
            self._farewells.pop(0)[1].stop(signal.SIGTERM)
        for deployment_id, group in list(self._arriving.items()):
            if group.is_settled:
                self._welcome(deployment_id, group)
        self._jobs = [job for job in self._jobs if not self._is_done(job)]
        self._leaving = [group for group in self._leaving if not group.is_over]
        if self.is_steady and not self._plan.was_served:
            self._plan.was_served = True
            self._write_plan()
        errors = [group.load_error for group in self._served.values() if group.load_error]
        self.fatal_error = self.fatal_error or next(iter(errors), None)

    def end(self, number: signal.Signals) -> None:
        """End all. SIGTERM: what runs may finish. SIGQUIT: now."""
        self.is_ending = True
        for group in self._all_groups():
            group.stop(number)

    # Inside

    def _load(self, deployment: Deployment) -> ReplicaGroup | str:
        """What will serve it, or why nothing will."""
        if self.is_ending:
            return "the server is shutting down"
        if deployment.id in self._arriving:
            return f"{deployment.id} is being loaded already"
        group = self._served.get(deployment.id)
        if group is not None and group.can_become(deployment):
            group.become(deployment)
            return group
        logger.info("loading %s", deployment.id)
        self._arriving[deployment.id] = group = ReplicaGroup(deployment, self._make_replica)
        return group

    def _unload(self, deployment_id: str) -> ReplicaGroup | str:
        group = self._served.pop(deployment_id, None)
        if group is None:
            return f"{deployment_id} is not loaded"
        logger.info("unloading %s", deployment_id)
        self._dismiss(group)
        self._write_plan()
        return group

    def _welcome(self, deployment_id: str, group: ReplicaGroup) -> None:
        """Let an arrival serve in the place of its predecessor, if it could be loaded."""
        del self._arriving[deployment_id]
        if group.load_error is not None:
            group.stop(signal.SIGQUIT)
            self._leaving.append(group)
            return
        if deployment_id in self._served:
            self._dismiss(self._served[deployment_id])
        self._served[deployment_id] = group
        self._write_plan()

    def _dismiss(self, group: ReplicaGroup) -> None:
        """Let it finish what it has, and end."""
        self._leaving.append(group)
        self._farewells.append((time.monotonic() + FAREWELL_S, group))

    def _is_done(self, job: _Job) -> bool:
        """Whether a command has been carried out; its sender is told so."""
        group, is_load = job.group, isinstance(job.command, LoadRequest)
        if not (group.is_settled or group.load_error if is_load else group.is_over):
            return False
        error = "the server is shutting down" if is_load and self.is_ending else group.load_error
        self._outcomes.append((job.sender, Outcome(job.command.token, error)))
        if is_load and group in self._served.values():
            group.settle()
            self._write_plan()
        return True

    def _make_replica(self, deployment: Deployment, index: int) -> Replica:
        gpu = deployment.gpus[index % len(deployment.gpus)] if deployment.gpus else None
        folder = self._folder / f"e{next(self._serials)}"
        return Replica(folder, deployment, self._plan, gpu=gpu, context=self._context, owner=self._self_pidfd)

    def _write_plan(self) -> None:
        """So that a successor of this process serves the same."""
        self._plan.deployments = [group.deployment for group in self._served.values()]
        draft = self._folder / (PLAN_FILE + ".new")
        draft.write_bytes(msgspec.json.encode(self._plan))
        draft.replace(self._folder / PLAN_FILE)

    def _all_groups(self) -> list[ReplicaGroup]:
        return [*self._served.values(), *self._arriving.values(), *self._leaving]

    def _all_replicas(self) -> list[Replica]:
        return [replica for group in self._all_groups() for replica in group.all_replicas]
