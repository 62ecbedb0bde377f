"""Kernel parameters as C lays them out, and the rule that lets launches overlap."""

from __future__ import annotations

import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_engine.ops._compile import kernels_folder
from cupy_engine.ops._launch import pack

KERNEL_FILES = sorted(kernels_folder().glob("*.cu"))


def test_parameters_are_aligned_as_in_a_struct() -> None:
    array = SimpleNamespace(data=SimpleNamespace(ptr=0x1234))
    inputs = np.zeros(1, np.dtype([("a", "u8"), ("b", "i4")]))
    inputs["a"], inputs["b"] = 5, 6
    packed = pack(1, array, 2.5, np.int64(-3), np.uint32(7), inputs, np.int32(8))
    assert packed == struct.pack("=i4xQf4xqI4xQii", 1, 0x1234, 2.5, -3, 7, 5, 6, 8)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_every_kernel_awaits_its_predecessors(path: object) -> None:
    """Before it can return, and so also where it has nothing to do."""
    text = path.read_text()  # type: ignore[attr-defined]
    bodies = re.findall(r"^__global__ [^{]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert len(bodies) == text.count("__global__")
    for body in bodies:
        start = re.search(r"\b(overlap_launches|await_predecessors)\(\);", body)
        assert start is not None
        assert "return;" not in body[: start.start()]
