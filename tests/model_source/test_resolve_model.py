"""What a user may call a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from golden_data import tiny_model

from cupy_engine import hub_model
from cupy_engine.errors import ModelLoadError
from cupy_engine.model_source import DEFAULT_MODEL, ModelFiles, list_models, resolve_model


def test_the_built_in_name(default_model: ModelFiles) -> None:
    assert default_model.name == DEFAULT_MODEL == "smollm2-135m"
    assert default_model.folder is None
    assert default_model.gguf is not None
    assert default_model.gguf.stat().st_size == 98362432
    assert resolve_model("smollm2-135m", offline=True) == default_model


def test_a_folder() -> None:
    folder = tiny_model("llama")
    assert resolve_model(folder) == resolve_model(str(folder)) == ModelFiles("llama", folder=folder)


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.Q4.gguf"
    path.touch()
    assert resolve_model(path) == ModelFiles("tiny.Q4", gguf=path)


def test_another_file() -> None:
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: is not a \.gguf file"):
        resolve_model(tiny_model("llama") / "model.safetensors")


@pytest.mark.parametrize("name", ["gpt-5", "/no/such/folder", "a/b/c", "./missing", "org/model.gguf", "../x/y", ""])
def test_nothing_by_that_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no model .*smollm2-135m"):
        resolve_model(name)


def test_files_are_a_folder_or_a_gguf_file() -> None:
    with pytest.raises(AssertionError):
        ModelFiles("both", folder=Path("a"), gguf=Path("b"))


def test_list_models(default_model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (listed,) = list_models()
    assert (listed.name, listed.is_cached, listed.num_bytes) == (DEFAULT_MODEL, True, 98362432)
    assert listed.path == default_model.gguf
    monkeypatch.setenv("CUPY_ENGINE_CACHE", str(tmp_path))
    (listed,) = list_models()
    assert not listed.is_cached
    assert tmp_path in listed.path.parents
    assert not listed.path.exists()


class TestHub:
    def test_an_id_is_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, dict[str, Any]]] = []

        def snapshot_download(repo_id: str, **options: Any) -> str:
            calls.append((repo_id, options))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        files = resolve_model("org/some-model", offline=True, progress=False)
        assert files == ModelFiles("org/some-model", folder=tmp_path)
        ((repo_id, options),) = calls
        assert (repo_id, options["local_files_only"]) == ("org/some-model", True)
        assert list(options["tqdm_class"]([1, 2], desc="shows nothing", name="x")) == [1, 2]
        assert not [pattern for pattern in options["allow_patterns"] if pattern.endswith((".py", ".bin", ".pt", "*"))]

    def test_a_folder_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "org" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve_model("org/model") == ModelFiles("model", folder=Path("org/model"))

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            hub_model.importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find_spec(name)
        )
        with pytest.raises(ModelLoadError, match=r"pip install 'cupy-engine\[hub\]'"):
            resolve_model("org/model")

    def test_offline_and_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            ModelLoadError, match="the hub does not give 'no-such-org/no-such-model': LocalEntryNotFound"
        ):
            resolve_model("no-such-org/no-such-model", offline=True)
