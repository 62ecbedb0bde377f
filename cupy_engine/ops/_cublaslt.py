"""cuBLASLt through ctypes: descriptors, heuristics and the product itself. Unlike CuPy's cuBLAS it can be captured.

Matrices here are column-major, as the library has them: D [rows, columns] = A' B, A [depth, rows], B [depth, columns].
A row-major product ``x @ weight.T`` is A = weight, B = x, D = out, each read as its own transpose.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from ctypes import c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
_COMPUTE_FLOAT32 = 68  # never TF32
_DESC_TRANSPOSE_A = 3
_DESC_EPILOGUE = 7
_DESC_BIAS_POINTER = 8
_EPILOGUE_BIAS = 4
_PREFERENCE_MAX_WORKSPACE_BYTES = 1
_PREFERENCE_MIN_ALIGNMENTS = (5, 6, 7, 8)  # of A, B, C, D
_SUCCESS = 0
_NOT_SUPPORTED = 15


class CublasLtError(RuntimeError):
    """A call of the library failed; ``status`` is its ``cublasStatus_t``."""

    def __init__(self, function: str, status: int) -> None:
        super().__init__(f"{function} returned cublasStatus_t {status}")
        self.status = status


class Algorithm(ctypes.Structure):
    """An opaque algorithm. Its bytes may be stored, and used again with the same library version on the same GPU."""

    _fields_ = (("data", c_uint64 * 8),)

    def to_hex(self) -> str:
        return bytes(self).hex()

    @classmethod
    def from_hex(cls, text: str) -> Algorithm | None:
        """``None`` if ``text`` is not 64 bytes in hexadecimal."""
        try:
            return cls.from_buffer_copy(bytes.fromhex(text))
        except ValueError:
            return None


class _HeuristicResult(ctypes.Structure):
    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    from cuda import pathfinder

    return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)


def version() -> int:
    """The library's version, 120903 for example."""
    get_version = _library().cublasLtGetVersion
    get_version.restype = c_size_t
    return int(get_version())


@functools.cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _call("cublasLtCreate", ctypes.byref(handle))
    return handle


@functools.cache
def _matmul_function() -> Any:
    """``cublasLtMatmul`` with its parameter types declared: plain integers convert faster than ctypes' objects."""
    function = _library().cublasLtMatmul
    function.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
    return function


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_library(), function)(*arguments)
    if status != _SUCCESS:
        raise CublasLtError(function, status)


@dataclass(frozen=True)
class Shape:
    """A product ``out[m, n] = x[m, k] @ weight[n, k].T``, row-major; rows of x lie ``stride`` elements apart."""

    m: int
    n: int
    k: int
    stride: int
    dtype: str
    out_dtype: str
    has_bias: bool


class Matmul:
    """Descriptors of one shape. They live as long as this object.

    Raises:
        CublasLtError: the library knows no such product.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._created: list[tuple[str, c_void_p]] = []
        weakref.finalize(self, _destroy, self._created)
        in_type, out_type = DATA_TYPES[shape.dtype], DATA_TYPES[shape.out_dtype]
        self._description = self._create("cublasLtMatmulDesc", c_int(_COMPUTE_FLOAT32), c_int(DATA_TYPES["float32"]))
        self._set(_DESC_TRANSPOSE_A, c_int32(1))
        if shape.has_bias:
            self._set(_DESC_EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        self._weight = self._layout(in_type, shape.k, shape.n, shape.k)
        self._x = self._layout(in_type, shape.k, shape.m, shape.stride)
        self._out = self._layout(out_type, shape.n, shape.m, shape.n)

    def _create(self, kind: str, *arguments: Any) -> c_void_p:
        created = c_void_p()
        _call(f"{kind}Create", ctypes.byref(created), *arguments)
        self._created.append((f"{kind}Destroy", created))
        return created

    def _layout(self, data_type: int, rows: int, columns: int, stride: int) -> c_void_p:
        return self._create(
            "cublasLtMatrixLayout", c_int(data_type), c_uint64(rows), c_uint64(columns), c_int64(stride)
        )

    def _set(self, attribute: int, value: Any) -> None:
        _call(
            "cublasLtMatmulDescSetAttribute",
            self._description,
            c_int(attribute),
            ctypes.byref(value),
            c_size_t(ctypes.sizeof(value)),
        )

    def heuristics(self, count: int, workspace_bytes: int, alignment: int) -> list[Algorithm]:
        """One to ``count`` algorithms, the most promising first, for arrays aligned to ``alignment`` bytes.

        Raises:
            CublasLtError: there is none.
        """
        preference = c_void_p()
        _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        try:
            limits: list[tuple[int, Any]] = [(_PREFERENCE_MAX_WORKSPACE_BYTES, c_uint64(workspace_bytes))]
            limits += [(attribute, c_uint32(alignment)) for attribute in _PREFERENCE_MIN_ALIGNMENTS]
            for attribute, value in limits:
                _call(
                    "cublasLtMatmulPreferenceSetAttribute",
                    preference,
                    c_int(attribute),
                    ctypes.byref(value),
                    c_size_t(ctypes.sizeof(value)),
                )
            return self._find(preference, count)
        finally:
            _call("cublasLtMatmulPreferenceDestroy", preference)

    def _find(self, preference: c_void_p, count: int) -> list[Algorithm]:
        results, num_found = (_HeuristicResult * count)(), c_int(0)
        layouts = (self._weight, self._x, self._out, self._out)
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            *(_handle(), self._description, *layouts, preference),
            *(c_int(count), results, ctypes.byref(num_found)),
        )
        found = [Algorithm.from_buffer_copy(r.algorithm) for r in results[: num_found.value] if r.state == _SUCCESS]
        if not found:
            raise CublasLtError(f"cublasLtMatmulAlgoGetHeuristic for {self.shape}", _NOT_SUPPORTED)
        return found

    def accepts(self, algorithm: Algorithm, workspace_bytes: int) -> bool:
        """Whether the algorithm can compute this shape with so much workspace."""
        result = _HeuristicResult()
        layouts = (self._weight, self._x, self._out, self._out)
        status = _library().cublasLtMatmulAlgoCheck(
            *(_handle(), self._description, *layouts, ctypes.byref(algorithm), ctypes.byref(result))
        )
        return bool(status == _SUCCESS and result.workspace_bytes <= workspace_bytes)

    def run(
        self,
        algorithm: Algorithm,
        x: int,
        weight: int,
        bias: int,
        out: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
    ) -> None:
        """Launch the product; arguments but the algorithm are addresses, the workspace's size and the stream's handle.

        Raises:
            CublasLtError: the launch failed.
        """
        if self.shape.has_bias:
            self._set(_DESC_BIAS_POINTER, c_void_p(bias))
        status = _matmul_function()(
            *(_handle(), self._description, _ONE, weight, self._weight, x, self._x),
            *(_ZERO, out, self._out, out, self._out),
            *(ctypes.byref(algorithm), workspace, workspace_bytes, stream),
        )
        if status != _SUCCESS:
            raise CublasLtError("cublasLtMatmul", status)


def _destroy(created: list[tuple[str, c_void_p]]) -> None:
    for function, descriptor in created:
        _call(function, descriptor)


_ONE, _ZERO = ctypes.byref(c_float(1.0)), ctypes.byref(c_float(0.0))
