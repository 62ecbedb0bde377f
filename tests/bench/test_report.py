"""How figures are shown, and what a baseline is given."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
from cupy_engine.bench import baseline, plot
from cupy_engine.bench.report import Figure, Report, Row, add_output_arguments, check_output, emit, table
from cupy_engine.bench.workloads import SHAPES, Workload, write_shape
from golden_data import tiny_model

from cupy_engine.errors import ConfigError
from cupy_engine.model_source import ModelFiles, load_model_config, resolve_model

ROWS = [
    Row("C = 1", {"num_requests": 19, "output_tokens_per_s": 163.84, "ttft_s_p99": 0.0241}),
    Row("C = 256", {"num_requests": 876, "output_tokens_per_s": 7475.2, "itl_s_p50": 0.0139}),
]


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_output_arguments(parser)
    return parser.parse_args(options)


def test_a_table_has_units_and_gaps() -> None:
    lines = [line.split() for line in table(ROWS).splitlines()]
    assert lines[0] == ["finished", "output", "TTFT", "p99", "ITL", "p50"]
    assert lines[1] == ["tokens/s", "ms", "ms"]
    assert lines[2] == ["C", "=", "1", "19", "163.8", "24.1", "–"]
    assert lines[3] == ["C", "=", "256", "876", "7,475", "–", "13.9"]


def test_text_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("title", {"model": "m"}, [Row("ours", {"decode_step_s": Figure.of([0.003, 0.001, 0.002])})])
    emit(report, arguments("--json", str(tmp_path / "f.json")))
    assert capsys.readouterr().out.split() == ["title", "ours", "decode", "step", "2", "ms", "(1", "–", "3)"]
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["model"] == "m"
    assert written["results"] == [{"name": "ours", "decode_step_s": {"median": 0.002, "low": 0.001, "high": 0.003}}]


def test_a_plot_shows_what_is_worth_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "f.png"
    emit(Report("title", {}, ROWS), arguments("--plot", str(file)))
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="plot: Format 'xyz' is not supported"):
        emit(Report("title", {}, ROWS), arguments("--plot", str(tmp_path / "f.xyz")))


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plot: needs matplotlib: pip install 'cupy-engine\[bench\]'"):
        check_output(arguments("--plot", "f.png"))


def test_the_baseline_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="baseline: torch and transformers must be installed"):
        baseline.run_baseline({}, Workload("w", 1, 1, 1), 1, 1)


def test_the_baseline_gets_the_model_as_it_is(default_model: ModelFiles, tmp_path: Path) -> None:
    shape = load_model_config(resolve_model(write_shape("llama3-8b", tmp_path)))
    assert baseline.hf_config(shape) == SHAPES["llama3-8b"]
    from_gguf, known = baseline.hf_config(load_model_config(default_model)), SHAPES["smollm2-135m"]
    same = {name for name in known if name in from_gguf and name not in ("rms_norm_eps", "max_position_embeddings")}
    assert {name: from_gguf[name] for name in same} == {name: known[name] for name in same}
    assert same > {"hidden_size", "num_key_value_heads", "vocab_size", "rope_theta", "tie_word_embeddings"}


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="torch and transformers are not installed"
)
def test_transformers_runs_to_the_full_length() -> None:
    options = {"model": str(tiny_model("llama")), "device": "cpu"}
    result = baseline.run_baseline(options, Workload("w", 5, 4, 3), batch_size=2, repeat=2)
    assert result.system.startswith("transformers ")
    assert len(result.full_s) == len(result.first_s) == 2
    assert min(result.full_s) > 0


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_told_first(option: str, tmp_path: Path) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"cannot write '.*nowhere/x.png': No such file or directory"):
        check_output(arguments(option, str(tmp_path / "nowhere" / "x.png")))
