"""Starting the engine process: once per server, whoever of its processes comes first."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cupy_engine.config import EngineConfig

from .runtime_folder import exclusive, make_runtime_folder, try_lock
from .wire import CONFIG_FILE, ENGINE_SOCKET, ERROR_FILE

STOP_MARGIN_S = 5.0


@dataclass
class EngineProcess:
    """The engine process of this server, as seen by a process of the same server.

    ``process`` is ``None`` where another process of the server started it.
    """

    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def load_error(self) -> str | None:
        """Why it could not start, in one line; ``None`` if it could, or has not tried yet."""
        try:
            return (self.folder / ERROR_FILE).read_text()
        except FileNotFoundError:
            return None

    def stop_now(self) -> None:
        """Make it fail what runs, and end."""
        self._signal(signal.SIGQUIT)

    def close(self, timeout_s: float = STOP_MARGIN_S) -> None:
        """End it, by force after ``timeout_s``, and remove its folder."""
        if self.process is not None:
            self.stop_now()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def ensure_engine(
    config: EngineConfig, owner_pid: int, drain_timeout_s: float, *, is_quiet: bool = False
) -> EngineProcess:
    """The engine process of the server whose main process is ``owner_pid``: started here if it does not run yet.

    It ends when the owner does, whatever happens to the caller.

    Args:
        drain_timeout_s: how long it lets requests finish when it is asked to end.
        is_quiet: it leaves it to the owner to say why it cannot start.
    """
    settings = msgspec.json.encode(config.to_dict())
    folder = make_runtime_folder(owner_pid, hashlib.sha256(settings).hexdigest()[:8])
    with exclusive(folder / "start.lock"):
        lock = try_lock(folder / "engine.lock")
        if lock is None:
            return EngineProcess(folder)
        owner = os.pidfd_open(owner_pid)
        try:
            (folder / ENGINE_SOCKET).unlink(missing_ok=True)
            (folder / CONFIG_FILE).write_bytes(settings)
            command = [str(folder), str(owner), str(drain_timeout_s), *(["--quiet"] if is_quiet else [])]
            return EngineProcess(folder, _spawn(command, (lock, owner)))
        finally:
            os.close(owner)
            os.close(lock)


def _spawn(arguments: list[str], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """A fresh interpreter in its own session, out of reach of the terminal's Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cupy_engine.server.engine_process", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=descriptors,
        start_new_session=True,
    )
