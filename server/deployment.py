"""What is served, as it is asked for and as it is; and what workers and the supervisor say to each other about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError

ReplicaState = Literal["loading", "ready", "restarting", "stopping", "failed"]

MAX_REPLICAS = 64
_NAME = re.compile(r"[^@\s\x00-\x1f\x7f]{1,200}")
_VERSION = re.compile(r"[A-Za-z0-9._-]{0,100}")


class Deployment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One version of a model.

    ``name``: what clients ask for. ``version``: tells those of one name apart; the name's requests are shared out by
    ``weight``. ``replicas``: engine processes that serve it. ``gpus``: the replicas' devices, taken in turns; empty
    leaves the choice to CUDA. ``engine``: fields of EngineConfig.
    """

    name: str
    version: str = ""
    weight: float = 1.0
    replicas: int = 1
    gpus: tuple[int, ...] = ()
    engine: dict[str, Any] = {}

    @property
    def id(self) -> str:
        """``name``, or ``name@version``: each version can be asked for by itself."""
        return f"{self.name}@{self.version}" if self.version else self.name

    def engine_config(self) -> EngineConfig:
        """Raises ConfigError for a bad engine option."""
        return EngineConfig.from_dict({**self.engine, "served_model_name": self.id})

    def checked(self) -> Deployment:
        """Itself.

        Raises:
            ConfigError: a value that is not allowed.
        """
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name", f"must be 1 to 200 characters without spaces or @, got {self.name!r}")
        if not _VERSION.fullmatch(self.version):
            raise ConfigError("version", f"must be letters, digits, dots and dashes, got {self.version!r}")
        if not 0 <= self.weight <= 1e6:
            raise ConfigError("weight", f"must be between 0 and 1000000, got {self.weight:g}")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ConfigError("replicas", f"must be between 1 and {MAX_REPLICAS}, got {self.replicas}")
        if any(not 0 <= gpu < 1024 for gpu in self.gpus):
            raise ConfigError("gpus", f"must be device numbers, got {list(self.gpus)}")
        self.engine_config()
        return self


def deployment_of(config: EngineConfig, *, replicas: int = 1) -> Deployment:
    """The deployment of a single model, under its own name."""
    name = config.served_model_name or own_name(config.model)
    return Deployment(name=name, replicas=replicas, engine=config.to_dict()).checked()


def own_name(model: str) -> str:
    """What a model is called if nobody says otherwise."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else path.stem if path.suffix.lower() == ".gguf" else model


class SupervisorPlan(msgspec.Struct, kw_only=True):
    """What a supervisor starts with; it writes every change down, so that a successor would go on from there.

    ``drain_timeout_s``: time for an engine's requests when it is asked to end. ``stall_timeout_s``: an engine whose
    loop has not come round for this long is ended and started again. ``max_engine_restarts``: that many in a row.
    ``was_served``: all of it was ready once.
    """

    deployments: list[Deployment]
    drain_timeout_s: float = 30.0
    stall_timeout_s: float = 60.0
    max_engine_restarts: int = 10
    was_served: bool = False


class ReplicaStatus(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An engine process as its supervisor sees it. ``error``: why it failed, if it did."""

    folder: str
    state: ReplicaState
    num_restarts: int = 0
    error: str | None = None


class ModelStatus(msgspec.Struct, kw_only=True):
    """A deployment that requests may go to, and its replicas."""

    deployment: Deployment
    replicas: list[ReplicaStatus]


class Roster(msgspec.Struct, kw_only=True, tag="roster"):
    """Everything that is served now. ``supervisor``: the pid of who says so."""

    supervisor: int = 0
    models: list[ModelStatus] = []


class RosterRequest(msgspec.Struct, tag="roster_request"):
    """Ask for the :class:`Roster`, now and whenever it changes."""


class LoadRequest(msgspec.Struct, tag="load"):
    """Serve a deployment, in the place of the one with its id if there is one. ``token`` comes back in the Outcome."""

    token: int
    deployment: Deployment


class UnloadRequest(msgspec.Struct, tag="unload"):
    """Stop serving a deployment; its requests may finish."""

    token: int
    deployment_id: str


class Outcome(msgspec.Struct, tag="outcome"):
    """How a command ended, once it has: a model that was loaded is ready, one that was unloaded has left memory."""

    token: int
    error: str | None = None


SupervisorCommand = RosterRequest | LoadRequest | UnloadRequest
SupervisorReply = Roster | Outcome

command_decoder: msgspec.msgpack.Decoder[SupervisorCommand] = msgspec.msgpack.Decoder(SupervisorCommand)
reply_decoder: msgspec.msgpack.Decoder[SupervisorReply] = msgspec.msgpack.Decoder(SupervisorReply)
