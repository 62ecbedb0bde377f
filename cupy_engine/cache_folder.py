"""Where downloaded and compiled things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$CUPY_ENGINE_CACHE``, else ``$XDG_CACHE_HOME/cupy-engine``, else ``~/.cache/cupy-engine``; may not exist."""
    if own := os.environ.get("CUPY_ENGINE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "cupy-engine"
    return Path.home() / ".cache" / "cupy-engine"
