"""Options of a server: for one model from a command line or keywords, for several from a TOML file.

port = 8000                      # any option of the server, as on the command line
drain_timeout_s = 60

[[models]]
name = "chat"                    # what clients ask for
version = "stable"               # only where a name has several
weight = 9                       # its share of the name's requests
replicas = 2                     # engine processes
gpus = [0, 1]                    # their devices, in turns
model = "path/to/model"          # and any option of the engine
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cupy_engine.config import EngineConfig, check_names
from cupy_engine.errors import ConfigError

from .deployment import Deployment, deployment_of, own_name
from .listen_config import ListenConfig
from .server_config import ServerConfig

_PLACING = {field.name for field in msgspec.structs.fields(Deployment)} - {"engine"}


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """What a file says."""

    deployments: list[Deployment]
    server: dict[str, Any]
    listen: dict[str, Any]


def read_models_file(path: str | Path) -> ModelsFile:
    """Read and check a file.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; says what and which model's.
    """
    try:
        options = tomllib.loads(Path(path).expanduser().read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError("config", f"cannot read {str(path)!r}: {reason}") from None
    tables = options.pop("models", None)
    if not isinstance(tables, list) or not tables:
        raise ConfigError("config", f"{str(path)!r} has no [[models]]")
    deployments = [deployment_from(table) for table in tables]
    for deployment_id, count in Counter(each.id for each in deployments).items():
        if count > 1:
            raise ConfigError("models", f"{deployment_id!r} is there {count} times; give each a version of its own")
    server, listen = _field_names(ServerConfig), _field_names(ListenConfig)
    check_names(options, server | listen)
    return ModelsFile(
        deployments,
        {name: value for name, value in options.items() if name in server},
        {name: value for name, value in options.items() if name in listen},
    )


def deployment_from(table: dict[str, Any], name: str | None = None) -> Deployment:
    """A deployment from one flat table of its own fields and the engine's.

    Raises:
        ConfigError: a bad value; the message says of which model.
    """
    if not isinstance(table, dict):
        raise ConfigError("models", f"each must be a table of options, got {table!r}")
    placing = {key: value for key, value in table.items() if key in _PLACING}
    engine = {key: value for key, value in table.items() if key not in _PLACING}
    if name is not None:
        placing["name"] = name
    if "name" not in placing:
        placing["name"] = own_name(str(engine.get("model", EngineConfig.model)))
    try:
        check_names(table, _PLACING | _field_names(EngineConfig))
        full = EngineConfig.from_dict({**engine, "served_model_name": None}).to_dict()
        return msgspec.convert({**placing, "engine": full}, Deployment).checked()
    except msgspec.ValidationError as error:
        field = str(error).rpartition("$.")[2].rstrip("`") if "$." in str(error) else "models"
        raise ConfigError(field, f"{str(error).partition(' - at')[0].lower()} (model {placing['name']})") from None
    except ConfigError as error:
        raise ConfigError(error.field, f"{str(error).partition(': ')[2]} (model {placing['name']})") from None


def split_options(options: dict[str, Any]) -> tuple[list[Deployment], ServerConfig]:
    """Sort keywords into the one model's and the server's, or take the models from the file ``config``.

    Raises:
        ConfigError: an option that neither has.
    """
    if "config" in options:
        file = read_models_file(options["config"])
        rest = {name: value for name, value in options.items() if name != "config"}
        check_names(rest, _field_names(ServerConfig))
        return file.deployments, ServerConfig(**file.server | rest)
    server_names, engine_names = _field_names(ServerConfig), _field_names(EngineConfig)
    check_names(options, engine_names | server_names | {"replicas"})
    engine = EngineConfig.from_dict({name: value for name, value in options.items() if name in engine_names})
    server = {name: value for name, value in options.items() if name in server_names}
    return [deployment_of(engine, replicas=options.get("replicas", 1))], ServerConfig(**server)


def _field_names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
