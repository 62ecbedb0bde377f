"""Typed look-ups in a model's description, with errors that name the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupy_engine.errors import ModelLoadError

_MAX_INTEGER = (1 << 31) - 1
_REQUIRED: Any = object()


class ConfigFields:
    """Fields of a JSON object or of GGUF metadata. Each look-up takes the first of ``names`` that is set.

    Without a ``default`` a field is required. JSON's null counts as not set.

    Raises (all look-ups):
        ModelLoadError: the field is missing, of the wrong type or out of range.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, prefix: str = "") -> None:
        self.values = values
        self.file = file
        self._prefix = prefix

    @classmethod
    def under(cls, prefix: str, values: Mapping[str, Any], file: Path) -> ConfigFields:
        """The fields whose names begin with ``prefix``, by the rest of their names."""
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        return cls(own, file, prefix)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, *names: str, default: Any = _REQUIRED, minimum: int = 1) -> Any:
        name, value = self._first(names, default)
        if name is None:
            return value
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not minimum <= value <= _MAX_INTEGER:
            raise self.error(name, f"must be an integer from {minimum} to {_MAX_INTEGER}, got {_shorten(value)}")
        return value

    def number(self, *names: str, default: Any = _REQUIRED, above: float = 0.0) -> Any:
        """A finite number greater than ``above``."""
        name, value = self._first(names, default)
        if name is None:
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not above < value < float("inf"):
            raise self.error(name, f"must be a number above {above:g}, got {_shorten(value)}")
        return float(value)

    def flag(self, *names: str, default: Any = _REQUIRED) -> Any:
        return self._typed(names, default, bool, "true or false")

    def text(self, *names: str, default: Any = _REQUIRED) -> Any:
        return self._typed(names, default, str, "a string")

    def mapping(self, *names: str, default: Any = _REQUIRED) -> Any:
        return self._typed(names, default, dict, "an object")

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id, or ``None`` if not set; some files write -1 for that."""
        value = self.values.get(name)
        return None if isinstance(value, int) and value == -1 else self._checked_token_id(name, value, vocab_size)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, in order, without repetition; empty if not set."""
        value = self.values.get(name)
        ids = [
            self._checked_token_id(name, item, vocab_size) for item in (value if isinstance(value, list) else [value])
        ]
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    def error(self, name: str, message: str) -> ModelLoadError:
        return ModelLoadError(f"field {self._prefix}{name}: {message}", file=self.file)

    def _checked_token_id(self, name: str, value: Any, vocab_size: int) -> int | None:
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise self.error(name, f"must be a token id below vocab_size = {vocab_size}, got {_shorten(value)}")
        return value

    def _typed(self, names: tuple[str, ...], default: Any, kind: type, allowed: str) -> Any:
        name, value = self._first(names, default)
        if name is not None and not isinstance(value, kind):
            raise self.error(name, f"must be {allowed}, got {_shorten(value)}")
        return value

    def _first(self, names: tuple[str, ...], default: Any) -> tuple[str | None, Any]:
        for name in names:
            if self.has(name):
                return name, self.values[name]
        if default is _REQUIRED:
            raise self.error(" or ".join(names), "is missing")
        return None, default


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
