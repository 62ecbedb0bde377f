"""Reads the JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cupy_engine.errors import ModelLoadError

_MAX_BYTES = 64 << 20


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object of at most 64 MiB.

    Raises:
        ModelLoadError: the file is missing, too large, not JSON or not an object.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ModelLoadError(f"is larger than {_MAX_BYTES >> 20} MiB", file=file)
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"cannot be read: {error.strerror}", file=file) from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"is not valid JSON: {error}", file=file) from error
    if not isinstance(value, dict):
        raise ModelLoadError("must hold a JSON object", file=file)
    return value
