"""The private folder in which an engine process and the workers of one server meet."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cupy_engine.errors import EngineError

PREFIX = "cupy-engine"
MAX_PATH_CHARS = 80  # a UNIX socket's path has at most 107


def make_runtime_folder(owner_pid: int, label: str) -> Path:
    """Create, or find, the folder of the server whose main process is ``owner_pid``; sweep away what dead ones left.

    Raises:
        EngineError: the folder exists and belongs to someone else, or others may read it.
    """
    base = _base_folder()
    remove_stale_folders(base)
    folder = base / f"{_stem(owner_pid)}-{label}"
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise EngineError(f"{folder} is not a private folder of this user; remove it, or point TMPDIR elsewhere")
    return folder


def runtime_folders(owner_pid: int) -> list[Path]:
    """Those of the server whose main process is ``owner_pid``, which lives."""
    return list(_base_folder().glob(f"{_stem(owner_pid)}-*"))


def remove_stale_folders(base: Path) -> None:
    """Remove the folders in ``base`` whose owners are gone: those of servers that were killed."""
    for folder in base.glob(f"{PREFIX}-{os.geteuid()}-*-*-*"):
        pid, started = folder.name.split("-")[3:5]
        if pid.isdigit() and start_time(int(pid)) != started:
            shutil.rmtree(folder, ignore_errors=True)


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot: with the pid, a name that is never reused. ``-`` if none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return fields[19]


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; others wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock file ``path``, or ``None`` if another process does.

    The lock belongs to the open file: a child that inherits the descriptor keeps it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _stem(owner_pid: int) -> str:
    return f"{PREFIX}-{os.geteuid()}-{owner_pid}-{start_time(owner_pid)}"


def _base_folder() -> Path:
    candidates = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    for name in candidates:
        if name and len(name) + len(PREFIX) + 48 <= MAX_PATH_CHARS and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    raise EngineError("no writable folder with a short path for sockets; set TMPDIR to one")
