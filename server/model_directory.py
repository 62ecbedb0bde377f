"""The models of this server as a worker offers them: what a request names becomes the Service that answers it."""

from __future__ import annotations

import hashlib
import math
import random
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from cupy_engine.frontend import FrontEnd
from cupy_engine.overload import AdmissionRule

from .api_errors import ApiError
from .client_watcher import ClientWatcher
from .deployment import Deployment, Roster
from .draining import Drain
from .engine_client import EngineClient
from .generation import Service
from .key_limits import KeyLimits
from .replica_pool import ReplicaPool
from .request_ids import RequestIds
from .roster_client import RosterClient
from .server_config import ServerConfig
from .wire import EngineStatus


class ServedModel:
    """A deployment, its replicas and its tokenizer; the latter is loaded when it is first asked for."""

    def __init__(self, deployment: Deployment, pool: ReplicaPool) -> None:
        self.deployment = deployment
        self.engine_config = deployment.engine_config()
        self.pool = pool
        self._lock = threading.Lock()
        self._front_end: FrontEnd | None = None
        self._max_model_len = 0
        pool.on_ready.append(self._adopt_limits)

    @property
    def front_end(self) -> FrontEnd:
        """Raises EngineError if tokenizer or configuration cannot be loaded."""
        with self._lock:
            if self._front_end is None:
                self._front_end = FrontEnd.from_config(self.engine_config)
                self._front_end.max_model_len = self._max_model_len or self._front_end.max_model_len
            return self._front_end

    def _adopt_limits(self, status: EngineStatus) -> None:
        self._max_model_len = status.max_model_len
        if self._front_end is not None:
            self._front_end.max_model_len = status.max_model_len


class ModelDirectory:
    """Follows the roster. Made before a fork if need be.

    Args:
        deployments: what is served until the supervisor says otherwise.
    """

    def __init__(self, deployments: Sequence[Deployment], config: ServerConfig) -> None:
        self.config = config
        self.roster: RosterClient | None = None
        self.key_limits: KeyLimits | None = None
        self.drain = Drain()
        self._ids = RequestIds()
        self._watcher = ClientWatcher()
        self._served = {each.id: self._serve(each) for each in deployments}

    def load_front_ends(self) -> None:
        """Load tokenizers now, to share their memory with processes forked later.

        Raises:
            EngineError: one of them cannot be loaded.
        """
        for served in self._served.values():
            _ = served.front_end

    def follow(self, roster: RosterClient) -> None:
        """Offer what the roster says, from the first :meth:`connect` on."""
        self.roster = roster
        roster.on_change.append(self._on_roster)

    def connect(self) -> None:
        """Begin to follow the roster, if this process has not yet."""
        if self.roster is not None:
            self.roster.connect()

    def find(self, name: str | None, user: str | None = None) -> Service:
        """The service of the model that a request names; no name means the first.

        Args:
            user: gets the same version of the model as long as weights allow it.

        Raises:
            ApiError 404: there is no such model.
        """
        self.connect()
        found = self._choose(name, user)
        if found is None and self.roster is not None:
            self.roster.refresh()  # another worker may have been told to load it
            found = self._choose(name, user)
        if found is None:
            raise _not_found(name, self.names())
        return Service(
            found.front_end,
            found.pool,
            self._watcher,
            found.engine_config,
            self.config,
            self.key_limits,
            self.drain,
        )

    def names(self) -> list[str]:
        """What a request may ask for: models, and their versions where they have any."""
        deployments = [served.deployment for served in self._served.values()]
        return list(dict.fromkeys([each.name for each in deployments] + [each.id for each in deployments]))

    def served(self) -> list[ServedModel]:
        self.connect()
        return list(self._served.values())

    def _choose(self, name: str | None, user: str | None) -> ServedModel | None:
        served = self._served
        if name is None:
            name = next((each.deployment.name for each in served.values()), None)
        versions = [each for each in served.values() if each.deployment.name == name and each.deployment.weight > 0]
        if not versions:
            return served.get(name or "")
        if len(versions) == 1:
            return versions[0]
        chosen = choose_version([each.deployment for each in versions], user)
        return next(each for each in versions if each.deployment is chosen)

    def _on_roster(self, roster: Roster) -> None:
        """On the roster's thread."""
        old, new = self._served, dict[str, ServedModel]()
        for model in roster.models:
            deployment = model.deployment
            known = old.get(deployment.id)
            if known is None or known.deployment.engine != deployment.engine:
                known = self._serve(deployment)
            known.deployment = deployment
            known.pool.update(model.replicas)
            new[deployment.id] = known
        self._served = new
        for served in old.values():
            if served not in new.values():
                served.pool.retire()

    def _serve(self, deployment: Deployment) -> ServedModel:
        engine = deployment.engine_config()
        rule = AdmissionRule(engine.max_queue_len, engine.slo_ttft_s)

        def make_client(folder: Path) -> EngineClient:
            return EngineClient(folder, stall_timeout_s=self.config.stall_timeout_s, rule=rule, ids=self._ids)

        return ServedModel(deployment, ReplicaPool(make_client, self._ids))


def choose_version(deployments: Sequence[Deployment], user: str | None) -> Deployment:
    """One of several versions, by weight; the same for the same user.

    Weighted rendezvous hashing: when weights change, only as many users change version as must.
    """
    if user is None:
        return random.choices(deployments, [each.weight for each in deployments])[0]

    def score(deployment: Deployment) -> float:
        digest = hashlib.blake2b(f"{deployment.id}\0{user}".encode(), digest_size=8).digest()
        return -math.log((int.from_bytes(digest) + 1) / (2**64 + 1)) / deployment.weight

    return min(deployments, key=score)


def _not_found(name: str | None, names: Iterable[str]) -> ApiError:
    served = ", ".join(repr(each) for each in names) or "no model"
    if name is None:
        return ApiError(404, "this server has no model; load one", param="model", code="model_not_found")
    shown = name if len(name) <= 80 else name[:77] + "..."
    message = f"model {shown!r} does not exist here; this server has {served}"
    return ApiError(404, message, param="model", code="model_not_found")
