"""Which way of computing a matrix product is fastest on this GPU: found by timing, kept on disk between runs.

The file is JSON, one per GPU model, cuBLASLt version and generation of this package's own ways:
``{"16 4096 14336 bfloat16 bfloat16 0": "<algorithm>"}``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tempfile
from pathlib import Path

from cupy_engine.cache_folder import cache_folder
from cupy_engine.ops import _cublaslt
from cupy_engine.ops._cublaslt import Shape

_GENERATION = 2  # of ways to compute; with another number, all shapes are timed anew
_NAME = re.compile(r"gemv|skinny[1248]|fused|apart|[0-9a-f]{128}")

_log = logging.getLogger(__name__)


def row_bucket(m: int) -> int:
    """The row count that is timed in place of m: the next power of two or, beyond 64, three quarters of it."""
    power = 1 << max(0, m - 1).bit_length()
    return power * 3 // 4 if 64 < m <= power * 3 // 4 else power


def row_buckets(most_rows: int) -> list[int]:
    """All row counts that are timed for up to ``most_rows`` rows."""
    return sorted({row_bucket(m) for m in range(1, most_rows + 1)})


class GemmTable:
    """Shape → name of the fastest product. Shapes of one row bucket share an entry; the stride of x does not matter.

    ``functor``: the activation of a gated product, which has an entry of its own.

    A file that cannot be read or written costs a warning and the time to tune again, nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = self._read()

    def get(self, shape: Shape, functor: str = "") -> str | None:
        return self._names.get(_key(shape, functor))

    def set(self, shape: Shape, name: str, functor: str = "") -> None:
        self._names[_key(shape, functor)] = name

    def save(self) -> None:
        """Write the file, together with what other processes have added to it since."""
        self._names = self._read() | self._names
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(self._names, file, indent=0, sort_keys=True)
            os.replace(file.name, self._path)
        except OSError as error:
            _log.warning("cannot keep GEMM timings in %s: %s", self._path, error)

    def _read(self) -> dict[str, str]:
        try:
            names = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("ignoring GEMM timings in %s: %s", self._path, error)
            return {}
        entries = names.items() if isinstance(names, dict) else ()
        return {key: name for key, name in entries if isinstance(name, str) and _NAME.fullmatch(name)}


def _key(shape: Shape, functor: str) -> str:
    fields = (row_bucket(shape.m), shape.n, shape.k, shape.dtype, shape.out_dtype, int(shape.has_bias), functor)
    return " ".join(map(str, fields)).rstrip()


@functools.cache
def table() -> GemmTable:
    """The table of the current GPU."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    gpu = re.sub(r"\W+", "-", properties["name"].decode())
    return GemmTable(cache_folder() / "gemm" / f"{gpu}-cublaslt-{_cublaslt.version()}-{_GENERATION}.json")
