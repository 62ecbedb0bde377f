"""The replicas of one deployment, as one thing that loads, changes its size and ends."""

from __future__ import annotations

import signal
from collections.abc import Callable

import msgspec

from .deployment import Deployment, ModelStatus
from .replica import Replica

MakeReplica = Callable[[Deployment, int], Replica]


class ReplicaGroup:
    """``make_replica`` gets the deployment and the replica's number."""

    def __init__(self, deployment: Deployment, make_replica: MakeReplica) -> None:
        self.deployment = deployment
        self.load_error: str | None = None
        self._make_replica = make_replica
        self._replicas = [make_replica(deployment, index) for index in range(deployment.replicas)]
        self._leaving: list[Replica] = []

    def take_over(self) -> None:
        """It was served before this supervisor: what cannot be started now is tried again."""
        for replica in self._replicas:
            replica.take_over()

    @property
    def all_replicas(self) -> list[Replica]:
        return self._replicas + self._leaving

    @property
    def status(self) -> ModelStatus:
        return ModelStatus(deployment=self.deployment, replicas=[replica.status for replica in self._replicas])

    @property
    def is_settled(self) -> bool:
        """Whether nothing loads or leaves."""
        return not self._leaving and all(replica.status.state != "loading" for replica in self._replicas)

    @property
    def is_over(self) -> bool:
        """Whether no process is left, and none will be started."""
        return all(replica.is_over for replica in self.all_replicas)

    def tick(self, elapsed_s: float) -> None:
        """Look after all processes. ``load_error`` says why one could not be started the first time."""
        for replica in self.all_replicas:
            replica.tick(elapsed_s)
        self._leaving = [replica for replica in self._leaving if not replica.is_over]
        for replica in [each for each in self._replicas if each.could_not_load]:
            self.load_error = replica.status.error
            self._replicas.remove(replica)

    def can_become(self, deployment: Deployment) -> bool:
        """Whether ``deployment`` differs in weight and number of replicas only, and no replica has been given up."""
        same = msgspec.structs.replace(deployment, weight=self.deployment.weight, replicas=self.deployment.replicas)
        return same == self.deployment and all(replica.status.state != "failed" for replica in self._replicas)

    def become(self, deployment: Deployment) -> None:
        """Take on the weight and the number of replicas of ``deployment``."""
        self.deployment = deployment
        while len(self._replicas) < deployment.replicas:
            self._replicas.append(self._make_replica(deployment, len(self._replicas)))
        while len(self._replicas) > deployment.replicas:
            replica = self._replicas.pop()
            replica.stop(signal.SIGTERM)
            self._leaving.append(replica)

    def settle(self) -> None:
        """Go on with the replicas that could be started."""
        self.load_error = None
        self.deployment = msgspec.structs.replace(self.deployment, replicas=max(1, len(self._replicas)))

    def stop(self, number: signal.Signals) -> None:
        """SIGTERM: finish what runs, then end. SIGQUIT: end now."""
        for replica in self.all_replicas:
            replica.stop(number)
