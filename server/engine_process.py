"""The engine process: loads the model, then does nothing but schedule and compute until it is told to end.

python -m cupy_engine.server.engine_process FOLDER OWNER_PIDFD DRAIN_TIMEOUT_S
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import zmq

from cupy_engine.config import EngineConfig
from cupy_engine.errors import EngineError
from cupy_engine.host_cpu import keep_blas_to_one_thread

from .engine_socket import EngineSocket
from .engine_status import StatusThread
from .logs import configure_logging
from .wire import CONFIG_FILE, ERROR_FILE, EngineState, EngineStatus

if TYPE_CHECKING:
    from cupy_engine.core import EngineCore
    from cupy_engine.core_loop import CoreLoop

logger = logging.getLogger(__name__)


class EngineServer:
    """The core, its loop and its sockets.

    SIGTERM: finish what runs, then end. SIGQUIT, SIGINT: end now. SIGUSR1: write down where every thread is.
    """

    def __init__(self, folder: Path, owner: int, drain_timeout_s: float) -> None:
        self._folder = folder
        self._owner = owner
        self._drain_timeout_s = drain_timeout_s
        self._state: EngineState = "loading"
        self._core: EngineCore | None = None
        self._loop: CoreLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = EngineSocket(self._context, folder)

    def run(self) -> int:
        """Serve until told to end; the exit status."""
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, self._stop)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        StatusThread(self._context, self._folder, self._owner, self._report).start()
        try:
            self._load()
        except EngineError as error:
            return self._give_up(str(error))
        except Exception as error:
            logger.exception("unexpected error while the engine loads")
            return self._give_up(f"{type(error).__name__}: {error}")
        assert self._loop is not None
        self._loop.run()
        return 0

    def _load(self) -> None:
        keep_blas_to_one_thread()
        from cupy_engine.core import EngineCore  # here, so that the status thread answers while these load
        from cupy_engine.core_loop import CoreLoop
        from cupy_engine.model_source import resolve_model

        config = EngineConfig.from_dict(msgspec.json.decode((self._folder / CONFIG_FILE).read_bytes()))
        self._core = EngineCore.from_config(config, resolve_model(config.model))
        self._socket.report_load = self._core.load
        self._loop = CoreLoop(self._core, self._socket, self._socket.deliver)
        self._state = "ready"

    def _give_up(self, reason: str) -> int:
        """Leave word of why it ends."""
        self._state = "stopping"
        (self._folder / ERROR_FILE).write_text(" ".join(reason.split()))
        return 1

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        was_loading, self._state = self._state == "loading", "stopping"
        if self._loop is not None:
            self._loop.stop(self._drain_timeout_s if number == signal.SIGTERM else 0.0)
        elif was_loading:
            raise SystemExit(0)

    def _report(self) -> EngineStatus:
        if self._loop is None or self._core is None:
            return EngineStatus(state=self._state)
        return EngineStatus(
            state=self._state,
            pid=os.getpid(),
            turn_age_s=time.monotonic() - self._socket.turn_s,
            backend=self._core.info.backend,
            num_kv_blocks=self._core.info.num_kv_blocks,
            max_model_len=self._core.info.max_model_len,
            gpu_ids=self._core.info.gpu_ids,
            load=self._core.load(),
        )

    def close(self) -> None:
        self._socket.close()


def main(arguments: list[str]) -> int:
    folder, owner, drain_timeout_s = arguments
    configure_logging()
    server = EngineServer(Path(folder), int(owner), float(drain_timeout_s))
    try:
        return server.run()
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
