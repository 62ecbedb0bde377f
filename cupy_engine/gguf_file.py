"""Reads the header of a GGUF file: metadata and where each tensor lies. Nothing in the file is believed unchecked.

    | magic, version, counts | metadata: key, type, value … | tensors: name, dims, type, offset … | pad | tensor data |

The ``gguf`` library's own reader builds several NumPy views per string and takes 2.6 s or more on a vocabulary of
49,152 tokens, all the time a server has to start; this one takes 0.03 s. Of the library we use the table of
quantization types here and the dequantization in :mod:`cupy_engine.gguf_weights`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cupy_engine.errors import ModelLoadError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_BYTES = 24
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMS = 4
_MIN_METADATA_BYTES = 8 + 4 + 1  # key length, type, a one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, number of dims, one dim, type, offset
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_read_u32 = struct.Struct("<I").unpack_from
_read_u64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. ``shape`` is row-major (ggml's dims reversed), ``offset`` counts from the file's start.

    ``type_name`` is ggml's (``F32``, ``Q4_1``): rows of ``block_elements`` values packed into ``block_bytes`` bytes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    block_elements: int
    block_bytes: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked header. Metadata values are int, float, bool, str, ``list[str]`` or a 1-D NumPy array of numbers."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read and check a GGUF header; the last file's is kept, so that configuration, tokenizer and weights share it.

    Raises:
        ModelLoadError: the file is missing, truncated or breaks a rule of the format; names the file and tensor.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelLoadError(f"cannot be read: {error.strerror}", file=path) from error
    return _read_version(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_version(path: Path, size: int, _mtime_ns: int) -> GGUFFile:
    if size < _HEADER_BYTES:
        raise ModelLoadError(f"truncated: {size} bytes are no GGUF header", file=path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except OSError as error:
        raise ModelLoadError(f"cannot be read: {error.strerror}", file=path) from error


class _Reader:
    """A position in the mapped file; every read is checked against the file's end first."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0

    def read(self) -> GGUFFile:
        if self._bytes(4, "magic") != _MAGIC:
            raise self._error("is not a GGUF file (wrong magic)")
        version = self._u32("version")
        if version not in _VERSIONS:
            raise self._error(f"GGUF version {version:#x} is not supported; little-endian versions 2 and 3 are")
        num_tensors = self._count("tensor count", _MIN_TENSOR_BYTES)
        num_entries = self._count("metadata count", _MIN_METADATA_BYTES)
        metadata = self._metadata(num_entries)
        num_parts = metadata.get("split.count", 1)
        if not isinstance(num_parts, int) or num_parts > 1:
            raise self._error("is one part of a split model; merge the parts with `llama-gguf-split --merge`")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        return GGUFFile(self._path, metadata, self._place_tensors(infos, self._alignment(metadata)))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("metadata key")
            if key in metadata:
                raise self._error(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(key)
        return metadata

    def _value(self, key: str) -> Any:
        type_id = self._u32(key)
        if type_id == _STRING:
            return self._string(key)
        if type_id == _ARRAY:
            return self._array(key)
        if type_id == _BOOL:
            return self._bytes(1, key) != b"\0"
        return self._numbers(key, type_id, 1)[0].item()

    def _array(self, key: str) -> Any:
        type_id = self._u32(key)
        if type_id == _STRING:
            return self._strings(key, self._count(key, 8))
        if type_id == _BOOL:
            return np.frombuffer(self._bytes(self._count(key, 1), key), np.uint8) != 0
        return self._numbers(key, type_id, self._count(key, 1))

    def _numbers(self, key: str, type_id: int, count: int) -> np.ndarray:
        if type_id not in _NUMBERS:
            raise self._error(f"metadata {key!r} has the unknown type {type_id}")
        dtype = np.dtype(_NUMBERS[type_id])
        return np.frombuffer(self._bytes(count * dtype.itemsize, key), dtype)

    def _strings(self, key: str, count: int) -> list[str]:
        """Written out: a vocabulary has 10^5 strings and this loop is most of the time that reading a header takes."""
        data, size, position = self._data, self._size, self._position
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                end = position + 8 + _read_u64(data, position)[0]
                if end > size:
                    raise self._error(f"truncated in {key!r}")
                append(data[position + 8 : end].decode())
                position = end
        except struct.error as error:
            raise self._error(f"truncated in {key!r}") from error
        except UnicodeDecodeError as error:
            raise self._error(f"{key!r} is not UTF-8") from error
        self._position = position
        return strings

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("tensor name")
        num_dims = self._u32(name)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._error(f"has {num_dims} dimensions, allowed are 1 to {_MAX_DIMS}", name)
        dims = tuple(self._u64(name) for _ in range(num_dims))
        return name, dims[::-1], self._u32(name), self._u64(name)

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"general.alignment must be a power of two from 8 to {_MAX_ALIGNMENT}, got {alignment!r}")
        return alignment

    def _place_tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, GGUFTensor]:
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in infos:
            if name in tensors:
                raise self._error("appears twice", name)
            if offset % alignment:
                raise self._error(f"offset {offset} is not a multiple of the alignment {alignment}", name)
            tensors[name] = self._place_tensor(name, shape, type_id, data_start + offset)
        self._refuse_overlaps(sorted(tensors.values(), key=lambda tensor: tensor.offset))
        return tensors

    def _place_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
        type_name, block_elements, block_bytes = _quantization_type(type_id) or ("", 0, 0)
        if not type_name:
            raise self._error(f"has the unknown type {type_id}", name)
        if 0 in shape or shape[-1] % block_elements:
            raise self._error(f"shape {shape} does not fit {type_name}'s blocks of {block_elements}", name)
        num_bytes = math.prod(shape) // block_elements * block_bytes
        if offset + num_bytes > self._size:
            end = offset + num_bytes
            raise self._error(f"truncated: {type_name} {shape} ends at byte {end}, the file at {self._size}", name)
        return GGUFTensor(name, shape, type_name, block_elements, block_bytes, offset, num_bytes)

    def _refuse_overlaps(self, tensors: list[GGUFTensor]) -> None:
        for before, after in pairwise(tensors):
            if before.offset + before.num_bytes > after.offset:
                raise self._error(f"overlaps tensor {before.name}", after.name)

    def _bytes(self, count: int, what: str) -> bytes:
        end = self._position + count
        if end > self._size:
            raise self._error(f"truncated in {what!r}")
        chunk = self._data[self._position : end]
        self._position = end
        return chunk

    def _u32(self, what: str) -> int:
        value: int = _read_u32(self._bytes(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _read_u64(self._bytes(8, what))[0]
        return value

    def _count(self, what: str, min_bytes_each: int) -> int:
        """A number of entries that the rest of the file can hold: a lie must not make us allocate or loop."""
        count = self._u64(what)
        if count * min_bytes_each > self._size - self._position:
            raise self._error(f"{what!r} promises {count} entries, more than the file can hold")
        return count

    def _string(self, what: str) -> str:
        try:
            return self._bytes(self._u64(what), what).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{what!r} is not UTF-8") from error

    def _error(self, message: str, tensor: str | None = None) -> ModelLoadError:
        return ModelLoadError(message, file=self._path, tensor=tensor)


@lru_cache(maxsize=64)
def _quantization_type(type_id: int) -> tuple[str, int, int] | None:
    """ggml's name, elements and bytes per block of a tensor type, or ``None`` if nobody knows it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantization = GGMLQuantizationType(type_id)
        block_elements, block_bytes = GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):
        return None
    return quantization.name, block_elements, block_bytes
