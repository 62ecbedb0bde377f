"""What travels between HTTP workers and the engine process, and through which sockets.

    FOLDER/            one per replica, private (0700), kept by the supervisor
      engine.json      the EngineConfig, written by the supervisor
      engine.sock      Command ──▶  ◀── Delivery          served by the engine's own loop, once a step
      status.sock      Ping ──▶     ◀── EngineStatus      served by a thread beside it, so it answers during long steps
      error.txt        why the engine could not start, if it could not

The engine keeps no table of who asked what: a worker's ``client_id`` (31 random bits) is the prefix of its request ids
and the upper half of its statistics tokens, and names its sockets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from cupy_engine.messages import AbortRequest, Command, GenerateRequest, Reply, StatsReply
from cupy_engine.overload import EngineLoad

ENGINE_SOCKET = "engine.sock"
STATUS_SOCKET = "status.sock"
CONFIG_FILE = "engine.json"
ERROR_FILE = "error.txt"

EngineState = Literal["loading", "ready", "stopping"]


class Ping(msgspec.Struct, tag="ping"):
    """Ask for an :class:`EngineStatus`."""


class EngineStatus(msgspec.Struct, kw_only=True, tag="status"):
    """How the engine process is doing.

    ``pid``: the process, which tells an engine from its successor.
    ``turn_age_s``: seconds since its loop last came round; it grows while one step runs, and for ever if that hangs.
    The rest is known once it is ready; see :class:`cupy_engine.core.CoreInfo`.
    """

    state: EngineState
    pid: int = 0
    turn_age_s: float = 0.0
    backend: str = ""
    num_kv_blocks: int = 0
    max_model_len: int = 0
    gpu_ids: tuple[str, ...] = ()
    load: EngineLoad = EngineLoad()


class Delivery(msgspec.Struct, array_like=True):
    """What the engine has to say to one worker after a step.

    ``read``: ids of this worker's requests that have come in since the last delivery. ``load``: with those.
    """

    replies: list[Reply]
    read: list[str]
    load: EngineLoad


encode = msgspec.msgpack.encode
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
delivery_decoder: msgspec.msgpack.Decoder[Delivery] = msgspec.msgpack.Decoder(Delivery)
ping_decoder = msgspec.msgpack.Decoder(Ping)
status_decoder = msgspec.msgpack.Decoder(EngineStatus)


def address(folder: Path, socket_name: str) -> str:
    return f"ipc://{folder / socket_name}"


def identity(client_id: int) -> str:
    """The routing id of a worker's sockets."""
    return f"{client_id:08x}"


def request_id(client_id: int, serial: int) -> str:
    return f"{client_id:08x}-{serial:x}"


def stats_token(client_id: int, serial: int) -> int:
    return client_id << 32 | serial & 0xFFFF_FFFF


def recipient(message: Reply | GenerateRequest | AbortRequest) -> str:
    """The routing id of the worker that a reply goes to, or a request or its end comes from."""
    if isinstance(message, StatsReply):
        return identity(message.token >> 32)
    return message.request_id[:8]
