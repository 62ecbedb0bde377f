"""Where CuPy keeps compiled kernels. It makes that folder when it is imported, and fails where it cannot be written.

A read-only home or a full disk must not stop the engine, so look first, and give CuPy another place if need be.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("cupy_engine")

_FOLDER, _IN_MEMORY = "CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"
_PROBE_BYTES = 1 << 20  # several kernels


def prepare_kernel_cache() -> None:
    """Call before the first import of CuPy, which reads the variables set here.

    If its folder cannot be written, the kernels in there are used, and new ones go to a folder that is removed when the
    process ends; if there is no room for that either, they stay in memory.
    """
    if "cupy" in sys.modules or os.environ.get(_IN_MEMORY, "0") != "0":
        return
    folder = Path(os.environ.get(_FOLDER) or "~/.cupy/kernel_cache").expanduser()
    reason = _why_not_writable(folder)
    if reason is None:
        return
    logger.warning("compiled kernels cannot be kept in %s (%s): they are compiled again at every start", folder, reason)
    try:
        os.environ[_FOLDER] = str(_temporary_copy(folder))
    except OSError:
        os.environ[_FOLDER] = os.sep  # any folder that exists: CuPy will not write there
        keep_in_memory()


def keep_in_memory() -> None:
    """Let CuPy neither read nor write kernels on disk from now on."""
    os.environ[_IN_MEMORY] = "1"


def _why_not_writable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _temporary_copy(folder: Path) -> Path:
    """A folder of links to the kernels in ``folder``, for as long as this process lives. Raises OSError: no room."""
    copy = Path(tempfile.mkdtemp(prefix="cupy-engine-kernels-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    reason = _why_not_writable(copy)
    if reason is not None:
        raise OSError(reason)
    for kernel in folder.glob("*.cubin"):
        (copy / kernel.name).symlink_to(kernel)
    return copy
