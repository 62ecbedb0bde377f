"""The GGUF header reader: what it reads, and that no lie in a file gets past it."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_builder import entry, gguf_bytes, string, tensor_info, write_tiny_llama

from cupy_engine import gguf_file
from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_file import GGUFFile, GGUFTensor, read_gguf
from cupy_engine.model_source import ModelFiles

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
FLOATS = np.arange(64, dtype="<f4").tobytes()


def read(folder: Path, content: bytes) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def array(type_id: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", type_id, count) + items


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    entries = [
        entry("byte", U8, b"\x07"),
        entry("int", U32, struct.pack("<I", 7)),
        entry("long", U64, struct.pack("<Q", 1 << 60)),
        entry("float", F32, struct.pack("<f", 0.5)),
        entry("yes", BOOL, b"\1"),
        entry("no", BOOL, b"\0"),
        entry("text", STRING, string("Grüße")),
        entry("texts", ARRAY, array(STRING, 3, string("a") + string("") + string("ü"))),
        entry("ints", ARRAY, array(U32, 2, struct.pack("<2I", 1, 2))),
        entry("flags", ARRAY, array(BOOL, 2, b"\1\0")),
    ]
    metadata = read(tmp_path, gguf_bytes(entries)).metadata
    assert metadata["ints"].tolist() == [1, 2]
    assert metadata["flags"].tolist() == [True, False]
    assert {key: value for key, value in metadata.items() if key not in ("ints", "flags")} == {
        "byte": 7,
        "int": 7,
        "long": 1 << 60,
        "float": 0.5,
        "yes": True,
        "no": False,
        "text": "Grüße",
        "texts": ["a", "", "ü"],
    }


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_placed(tmp_path: Path, version: int) -> None:
    infos = [tensor_info("a", (4, 2)), tensor_info("q", (32, 1), type_id=3, offset=32)]
    content = gguf_bytes(infos=infos, data=FLOATS, version=version)
    gguf = read(tmp_path, content)
    start = len(content) - len(FLOATS)
    assert gguf.tensors == {
        "a": GGUFTensor("a", (2, 4), "F32", 1, 4, start, 32),
        "q": GGUFTensor("q", (1, 32), "Q4_1", 32, 20, start + 32, 20),
    }


def test_alignment_of_the_data(tmp_path: Path) -> None:
    entries = [entry("general.alignment", U32, struct.pack("<I", 256))]
    content = gguf_bytes(entries, [tensor_info("a", (4,))], FLOATS, alignment=256)
    assert read(tmp_path, content).tensors["a"].offset == len(content) - len(FLOATS)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    assert read(tmp_path, gguf_bytes([entry("k", U8, b"\1")])).metadata == {"k": 1}
    assert read(tmp_path, gguf_bytes([entry("key", U8, b"\2")])).metadata == {"key": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"GGUF", "truncated"),
        (gguf_bytes(magic=b"GGML"), "not a GGUF file"),
        (gguf_bytes(version=1), "version 0x1 is not supported"),
        (gguf_bytes(version=0x03000000), "version 0x3000000 is not supported"),
        (gguf_bytes(num_entries=1 << 40), "promises 1099511627776 entries"),
        (gguf_bytes(num_tensors=1 << 63), "promises 9223372036854775808 entries"),
        (gguf_bytes([entry("a", U8, b"\1")] * 2), "'a' appears twice"),
        (gguf_bytes([entry("a", 13, b"\0" * 8)]), "'a' has the unknown type 13"),
        (gguf_bytes([entry("a", STRING, struct.pack("<Q", 1 << 62))]), "truncated in 'a'"),
        (gguf_bytes([entry("a", STRING, string(b"\xff"))]), "'a' is not UTF-8"),
        (gguf_bytes([entry("a", ARRAY, array(STRING, 1, string(b"\xff")))]), "'a' is not UTF-8"),
        (gguf_bytes([entry("a", ARRAY, array(STRING, 1, struct.pack("<Q", (1 << 64) - 1)))]), "truncated in 'a'"),
        (gguf_bytes([entry("a", ARRAY, array(STRING, 1 << 50, b""))]), "'a' promises 1125899906842624 entries"),
        (gguf_bytes([entry("a", ARRAY, array(U64, 1 << 61, b""))]), "'a' promises"),
        (gguf_bytes([entry("a", ARRAY, array(U64, 20, b"\0" * 32))]), "truncated in 'a'"),
        (gguf_bytes([entry("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))]), "'a' has the unknown type 9"),
        (gguf_bytes([entry("general.alignment", U32, struct.pack("<I", 24))]), "general.alignment must be a power"),
        (gguf_bytes([entry("general.alignment", U32, struct.pack("<I", 0))]), "general.alignment must be a power"),
        (gguf_bytes([entry("general.alignment", STRING, string("32"))]), "general.alignment must be a power"),
        (gguf_bytes([entry("split.count", U32, struct.pack("<I", 3))]), "one part of a split model"),
    ],
)
def test_lies_in_the_header(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.gguf: ") as caught:
        read(tmp_path, content)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([tensor_info("a", ())], "has 0 dimensions"),
        ([tensor_info("a", (1,) * 5)], "has 5 dimensions"),
        ([tensor_info("a", (0, 4))], "shape (4, 0) does not fit"),
        ([tensor_info("a", (33,), type_id=3)], "does not fit Q4_1's blocks of 32"),
        ([tensor_info("a", (4,), type_id=4)], "unknown type 4"),
        ([tensor_info("a", (4,), type_id=999)], "unknown type 999"),
        ([tensor_info("a", (4,), offset=16)], "offset 16 is not a multiple of the alignment 32"),
        ([tensor_info("a", (65,))], "truncated"),
        ([tensor_info("a", (4,), offset=256)], "truncated"),
        ([tensor_info("a", (4,), offset=(1 << 64) - 32)], "truncated"),
        ([tensor_info("a", (1 << 32, 1 << 32))], "truncated"),
        ([tensor_info("a", (1 << 63, 1 << 63, 1 << 63, 4))], "truncated"),
        ([tensor_info("b", (16,)), tensor_info("a", (4,), offset=32)], "overlaps tensor b"),
        ([tensor_info("a", (4,)), tensor_info("a", (4,), offset=32)], "appears twice"),
    ],
)
def test_lies_about_a_tensor_name_it(tmp_path: Path, infos: list[bytes], message: str) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.gguf, tensor a: ") as caught:
        read(tmp_path, gguf_bytes(infos=infos, data=FLOATS))
    assert message in str(caught.value)
    assert caught.value.tensor == "a"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"absent\.gguf: cannot be read: No such file"):
        read_gguf(tmp_path / "absent.gguf")


def test_agrees_with_the_library(tmp_path: Path) -> None:
    import gguf

    path = write_tiny_llama(tmp_path / "model.gguf", quantization="Q5_0")
    ours = read_gguf(path).tensors
    theirs = gguf.GGUFReader(path).tensors
    assert list(ours) == [tensor.name for tensor in theirs]
    for tensor in theirs:
        found = ours[tensor.name]
        assert (found.offset, found.num_bytes, found.type_name) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )
        assert found.shape == tuple(int(dim) for dim in tensor.shape[::-1])


def test_a_large_vocabulary_is_read_fast(default_model: ModelFiles) -> None:
    assert default_model.gguf is not None
    times_s = []
    for _ in range(5):
        gguf_file._read_version.cache_clear()
        start_s = time.perf_counter()
        gguf = read_gguf(default_model.gguf)
        times_s.append(time.perf_counter() - start_s)
    assert len(gguf.metadata["tokenizer.ggml.tokens"]) == 49152
    assert min(times_s) < 0.25, "some 0.03 s on an idle core"
