"""Finding a model's class by architecture, and adding one from outside."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from cupy_engine.models.llama import LlamaForCausalLM

from cupy_engine import model_registry
from cupy_engine.errors import ModelLoadError
from cupy_engine.model_registry import known_architectures, model_class, register_model

OUTSIDE_MODULE = """
from cupy_engine.models.llama import LlamaForCausalLM

class OutsideForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_registry, "_MODELS", dict(model_registry._MODELS))


@pytest.fixture
def outside_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "outside_models.py").write_text(OUTSIDE_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_models", raising=False)
    return "outside_models:OutsideForCausalLM"


def test_built_in_models() -> None:
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel"):
        assert model_class(architecture).__name__ == architecture
        assert architecture in known_architectures()


def test_a_class_or_a_name_registered_from_outside(outside_module: str) -> None:
    register_model("OutsideForCausalLM", outside_module)
    assert model_class("OutsideForCausalLM").__module__ == "outside_models"
    register_model("OutsideForCausalLM", LlamaForCausalLM)
    assert model_class("OutsideForCausalLM") is LlamaForCausalLM


def test_an_entry_point_of_another_package(
    outside_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "outside_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cupy_engine.models]\nOutsideForCausalLM = {outside_module}\n")
    importlib.invalidate_caches()
    assert "OutsideForCausalLM" in known_architectures()
    assert model_class("OutsideForCausalLM").__module__ == "outside_models"


def test_unknown_architectures_are_named_with_the_known_ones() -> None:
    with pytest.raises(ModelLoadError, match=r"'MambaForCausalLM' is unknown; known are .*LlamaForCausalLM"):
        model_class("MambaForCausalLM")


@pytest.mark.parametrize("path", ["no_such_module:Model", "cupy_engine.models.llama:NoSuchClass"])
def test_a_class_that_cannot_be_imported(path: str) -> None:
    register_model("BrokenForCausalLM", path)
    with pytest.raises(ModelLoadError, match=path):
        model_class("BrokenForCausalLM")
