"""Who may import whom, how fast, and what may not be imported at all."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_data import GOLDEN

import cupy_engine

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("cupy_engine", "models", "server", "kernels") for p in (ROOT / folder).rglob("*.py"))
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FOREIGN = {"torch", "transformers", "vllm"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_directions(path: Path) -> None:
    modules = imported_modules(path)
    folder = path.relative_to(ROOT).parts[0]
    above = {
        "cupy_engine": ("cupy_engine.server", "cupy_engine.models"),
        "models": ("cupy_engine.server",),
        "kernels": ("cupy_engine",),
        "server": (),
    }[folder]
    assert not [m for m in modules if m.startswith(above)], "an import against the direction of the layers"
    assert not {m.split(".")[0] for m in modules} & (UNSAFE | FOREIGN)


@pytest.mark.parametrize(
    "name",
    ["scheduler", "step_planner", "plan_builder", "block_manager", "block_pool", "request", "request_queue", "seats"],
)
def test_scheduling_knows_no_arrays(name: str) -> None:
    modules = imported_modules(ROOT / "cupy_engine" / f"{name}.py")
    assert not {m.split(".")[0] for m in modules} & {"numpy", "cupy"}


def test_no_eval_or_exec() -> None:
    for path in SOURCES:
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {f.id for f in calls if isinstance(f, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, path


def test_public_names() -> None:
    assert cupy_engine.__all__ == [
        "CompletionDelta",
        "CompletionOutput",
        "ConfigError",
        "DeadlineExceededError",
        "Engine",
        "EngineConfig",
        "EngineDeadError",
        "EngineError",
        "InvalidRequestError",
        "ModelLoadError",
        "QueueFullError",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputs",
        "TokenLogprob",
        "register_model",
    ]
    assert all(hasattr(cupy_engine, name) for name in cupy_engine.__all__)


def test_import_is_fast_and_light() -> None:
    """Best of five: 0.3 s is the limit on an idle machine."""
    code = "import sys, cupy_engine; print('numpy' in sys.modules, 'flask' in sys.modules)"
    durations = []
    for _ in range(5):
        start_s = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        durations.append(time.perf_counter() - start_s)
        assert run.stdout.split() == ["False", "False"]
    assert min(durations) < 0.3


def test_an_engine_on_the_cpu_looks_for_no_gpu() -> None:
    """CuPy takes 170 MB and, on a slow machine, a second to import."""
    code = f"""
import sys
class Guard:
    def find_spec(name, path=None, target=None):
        assert name.partition(".")[0] != "cupy"
sys.meta_path.insert(0, Guard)
from cupy_engine import Engine
with Engine(model={str(GOLDEN / "tiny" / "llama")!r}, device="cpu", num_kv_blocks=32) as engine:
    print(engine.info.backend)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "NumPy (CPU)", run.stderr
