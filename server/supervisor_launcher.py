"""Starting the supervisor and with it the engines: once per server, whoever of its processes comes first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cupy_engine.errors import EngineDeadError

from .deployment import SupervisorPlan
from .fleet import PLAN_FILE
from .runtime_folder import exclusive, make_runtime_folder, runtime_folders, try_lock
from .wire import ERROR_FILE

LOCK = "supervisor.lock"  # held by the supervisor, as long as it lives
START_LOCK = "start.lock"
STOP_MARGIN_S = 8.0


@dataclass
class SupervisorProcess:
    """The supervisor of this server, as seen by a process of the same server.

    ``process`` is ``None`` where another process of the server started it.
    """

    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def load_error(self) -> str | None:
        """Why the engines could not start, in one line; ``None`` if they could, or have not tried yet."""
        try:
            return (self.folder / ERROR_FILE).read_text()
        except FileNotFoundError:
            return None

    def close(self, timeout_s: float = STOP_MARGIN_S) -> None:
        """End it, by force after ``timeout_s``; the folder goes with it.

        A successor that another process has started ends when the server's main process does.
        """
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        _remove(self.folder)


def remove_runtime_folders() -> None:
    """What the main process of a server under plain gunicorn does at its end, in case that no supervisor is left to."""
    for folder in runtime_folders(os.getpid()):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Unless a supervisor has the folder still: it will, when the server's main process has ended."""
    with contextlib.suppress(FileNotFoundError), exclusive(folder / START_LOCK):
        if (lock := try_lock(folder / LOCK)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def ensure_supervisor(plan: SupervisorPlan, owner_pid: int, *, is_quiet: bool = False) -> SupervisorProcess:
    """The supervisor of the server whose main process is ``owner_pid``: started here if it does not run.

    It ends when the owner does, whatever happens to the caller. One that was killed has a successor that goes on with
    what was served last.

    Args:
        plan: what to serve.
        is_quiet: it leaves it to the owner to say why it cannot start.

    Raises:
        EngineDeadError: the owner has ended.
    """
    settings = msgspec.json.encode(plan)
    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        raise EngineDeadError("the server has ended") from None
    try:
        folder = make_runtime_folder(owner_pid, hashlib.sha256(settings).hexdigest()[:8])
        return _start_once(folder, settings, owner, is_quiet)
    finally:
        os.close(owner)


def _start_once(folder: Path, settings: bytes, owner: int, is_quiet: bool) -> SupervisorProcess:
    with exclusive(folder / START_LOCK):
        lock = try_lock(folder / LOCK)
        if lock is None:
            return SupervisorProcess(folder)
        try:
            if not (folder / PLAN_FILE).exists():
                (folder / PLAN_FILE).write_bytes(settings)
            command = [str(folder), str(owner), *(["--quiet"] if is_quiet else [])]
            return SupervisorProcess(folder, _spawn(command, (lock, owner)))
        finally:
            os.close(lock)


def _spawn(arguments: list[str], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """A fresh interpreter in its own session, out of reach of the terminal's Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cupy_engine.server.supervisor", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=descriptors,
        start_new_session=True,
    )
