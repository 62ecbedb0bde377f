"""The private folder of a server's sockets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cupy_engine.server import runtime_folder
from cupy_engine.server.runtime_folder import exclusive, make_runtime_folder, start_time, try_lock

from cupy_engine.errors import EngineError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime_folder, "_base_folder", lambda: tmp_path)
    return tmp_path


def test_the_same_server_gets_the_same_private_folder(base: Path) -> None:
    folder = make_runtime_folder(os.getpid(), "a")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make_runtime_folder(os.getpid(), "a") == folder
    assert make_runtime_folder(os.getpid(), "b") != folder


def test_a_folder_that_others_can_enter_is_refused(base: Path) -> None:
    make_runtime_folder(os.getpid(), "a").chmod(0o755)
    with pytest.raises(EngineError, match="private"):
        make_runtime_folder(os.getpid(), "a")


def test_a_link_in_its_place_is_refused(base: Path) -> None:
    folder = make_runtime_folder(os.getpid(), "a")
    folder.rmdir()
    (base / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(base / "elsewhere")
    with pytest.raises(EngineError, match="private"):
        make_runtime_folder(os.getpid(), "a")


def test_folders_of_dead_servers_are_swept_and_others_kept(base: Path) -> None:
    mine = make_runtime_folder(os.getpid(), "a")
    dead = base / f"cupy-engine-{os.geteuid()}-999999999-5-a"
    reused_pid = base / f"cupy-engine-{os.geteuid()}-{os.getpid()}-5-a"
    foreign = base / "cupy-engine-notes"
    for folder in (dead, reused_pid, foreign):
        folder.mkdir()
    make_runtime_folder(os.getpid(), "b")
    assert mine.exists()
    assert foreign.exists()
    assert not dead.exists()
    assert not reused_pid.exists()


def test_start_time_tells_processes_apart() -> None:
    assert start_time(os.getpid()).isdigit()
    assert start_time(999999999) == "gone"


def test_locks(base: Path) -> None:
    held = try_lock(base / "lock")
    assert held is not None
    assert try_lock(base / "lock") is None
    os.close(held)
    with exclusive(base / "lock"):
        assert try_lock(base / "lock") is None
    again = try_lock(base / "lock")
    assert again is not None
    os.close(again)
