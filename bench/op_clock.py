"""How much of the engine's time is spent inside its ops."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any

from cupy_engine import ops
from cupy_engine.errors import ModelLoadError
from cupy_engine.model_registry import known_architectures, model_class

Function = Callable[..., Any]


class OpClock:
    """Times every call of a public op by the engine's thread; an op within an op counts once.

    Right on the NumPy backend only: on a GPU a launch returns before its work is done. Costs half a microsecond a call.
    """

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._is_inside = False

    @classmethod
    def installed(cls) -> OpClock:
        """A clock around all ops of this process. To be called before an engine is built, as layers keep ops."""
        clock = cls()
        for architecture in known_architectures():
            with suppress(ModelLoadError):  # a package that registers one may be broken
                model_class(architecture)
        importlib.import_module("cupy_engine.core_builder")
        timed = {op: clock._timed(op) for module in _op_modules() for op in _functions_of(module)}
        for name in [name for name in sys.modules if name.split(".")[0] == "cupy_engine"]:
            _replace(vars(sys.modules[name]), timed)
        return clock

    def seconds_between(self, start_s: float, end_s: float) -> float:
        """Time in ops that began in an interval of ``time.monotonic``."""
        calls = slice(bisect_left(self._starts, start_s), bisect_left(self._starts, end_s))
        return sum(self._ends[calls]) - sum(self._starts[calls])

    def _timed(self, op: Function) -> Function:
        @wraps(op)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:
                return op(*arguments, **options)
            self._is_inside = True
            start_s = time.monotonic()
            try:
                return op(*arguments, **options)
            finally:
                self._ends.append(time.monotonic())
                self._starts.append(start_s)
                self._is_inside = False

        return timed


def _op_modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_")]
    return [importlib.import_module(f"{ops.__name__}.{name}") for name in names]


def _functions_of(module: ModuleType) -> list[FunctionType]:
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _replace(names: dict[str, Any], timed: dict[FunctionType, Function]) -> None:
    for name, value in names.items():
        if isinstance(value, FunctionType) and value in timed:
            names[name] = timed[value]
        elif type(value) is dict and not name.startswith("__"):  # tables of ops, activations by name
            _replace(value, timed)
