"""Tensors of a Hugging Face folder: one safetensors file or several with an index, mapped into memory, never copied."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cupy_engine.errors import ModelLoadError
from cupy_engine.json_file import read_json_object
from cupy_engine.model_config import ModelConfig
from cupy_engine.weights import check_shape

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BASE_MODEL_PREFIXES = ("transformer.", "model.")
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # old checkpoints keep these constants


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    file: Path
    data: np.ndarray  # [num_bytes] uint8, a view of the mapped file
    dtype: str
    shape: tuple[int, ...]


class SafetensorsWeights:
    """A WeightSource over the safetensors files of a model folder.

    Checkpoints of the bare base model leave out its prefix (``h.0.ln_1.weight`` for ``transformer.h.0.ln_1.weight``);
    they are found under the full name as well.

    Raises:
        ModelLoadError: no safetensors files, a missing or broken one, an index that points out of the folder.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder = folder
        self._is_tied = config.tie_word_embeddings
        self._tensors = _open_folder(folder)
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        stored_name = self._stored_name(name)
        if stored_name is None:
            raise ModelLoadError("is missing", file=self._folder, tensor=name)
        tensor = self._tensors[stored_name]
        check_shape(tensor.shape, shape, tensor.file, name)
        if tensor.dtype not in _DTYPES:
            raise ModelLoadError(f"type {tensor.dtype} is not supported", file=tensor.file, tensor=name)
        self._taken.add(stored_name)
        array: np.ndarray = tensor.data.view(_DTYPES[tensor.dtype]).reshape(shape)
        return array

    @property
    def num_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self._tensors.values())

    def has(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def unused(self) -> list[str]:
        return [name for name in self._tensors if name not in self._taken and not self._is_redundant(name)]

    def close(self) -> None:
        self._tensors.clear()

    def _is_redundant(self, name: str) -> bool:
        return _BUFFERS.search(name) is not None or (self._is_tied and name == "lm_head.weight")

    def _stored_name(self, name: str) -> str | None:
        without_prefix = (name.removeprefix(prefix) for prefix in _BASE_MODEL_PREFIXES)
        return next((candidate for candidate in (name, *without_prefix) if candidate in self._tensors), None)


def _open_folder(folder: Path) -> dict[str, _StoredTensor]:
    if (folder / _INDEX_FILE).is_file():
        return _open_shards(folder)
    if (folder / _SINGLE_FILE).is_file():
        return dict(_open_file(folder / _SINGLE_FILE))
    raise ModelLoadError(
        f"has neither {_SINGLE_FILE} nor {_INDEX_FILE}; weights in other formats must be converted to safetensors",
        file=folder,
    )


def _open_shards(folder: Path) -> dict[str, _StoredTensor]:
    index_file = folder / _INDEX_FILE
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelLoadError("field weight_map: must be an object of tensor and file names", file=index_file)
    shards: dict[str, dict[str, _StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelLoadError(
                f"{shard!r} is not a safetensors file in the same folder", file=index_file, tensor=name
            )
        if shard not in shards:
            shards[shard] = dict(_open_file(folder / shard))
        if name not in shards[shard]:
            raise ModelLoadError(
                f"the index {_INDEX_FILE} promises this tensor, which the file lacks", file=folder / shard, tensor=name
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _open_file(file: Path) -> Iterator[tuple[str, _StoredTensor]]:
    """The library checks the header (sizes, offsets, gaps, overlaps); offsets count from the header's end."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
        data = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError as error:
        raise ModelLoadError("is missing", file=file) from error
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"is not a readable safetensors file: {error}", file=file) from error
    data_start = 8 + int(data[:8].view("<u8")[0])
    header: dict[str, Any] = json.loads(data[8:data_start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = (data_start + offset for offset in entry["data_offsets"])
        yield name, _StoredTensor(file, data[start:end], entry["dtype"], tuple(entry["shape"]))
