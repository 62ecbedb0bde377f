"""The command line on the default model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
import types

import pytest
from cupy_engine.server.cli import main
from cupy_engine.server.commands import build_parser
from cupy_engine.server.gunicorn_app import gunicorn_settings
from cupy_engine.server.listen_config import ListenConfig
from cupy_engine.server.server_config import ServerConfig

from cupy_engine import __version__
from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError
from cupy_engine.model_source import ModelFiles

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
Captured = pytest.CaptureFixture[str]


def test_generate(default_model: ModelFiles, capsys: Captured) -> None:
    assert main(["generate", QUESTION]) == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    summary = err.splitlines()[-1]
    assert summary.startswith("8 tokens, TTFT ")
    assert " tokens/s, NumPy" in summary


def test_generate_json(warm: None, capsys: Captured) -> None:
    assert main(["generate", "--json", "--max-tokens", "4", QUESTION]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "smollm2-135m"
    assert answer["outputs"][0]["text"] == "The capital of France"
    assert answer["outputs"][0]["finish_reason"] == "length"
    assert (answer["num_prompt_tokens"], answer["num_output_tokens"]) == (37, 4)
    assert answer["ttft_s"] > 0
    assert answer["tokens_per_s"] > 0


def test_generate_raw_from_standard_input(warm: None, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The capital of France is"))
    assert main(["generate", "--raw", "--max-tokens", "1", "-"]) == 0
    assert capsys.readouterr().out == " Paris\n"


def test_generate_several(warm: None, capsys: Captured) -> None:
    options = ["--n", "2", "--temperature", "1.5", "--seed", "1", "--max-tokens", "5"]
    assert main(["generate", *options, QUESTION]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[0] ")
    assert second.startswith("[1] ")


def test_generate_stops(warm: None, capsys: Captured) -> None:
    assert main(["generate", "--stop", " France", QUESTION]) == 0
    assert capsys.readouterr().out == "The capital of\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "-m", "no-such-model", "x"], "smollm2-135m"),
        (["generate", "--temperature", "-1", "x"], "temperature must be between 0 and 100, got -1.0"),
        (["generate", "--max-num-seqs", "0", "x"], "max_num_seqs: must be at least 1"),
        (["serve", "--max-n", "99"], "max_n: must be between 1 and 16"),
        (["serve", "--port", "70000"], "port: must be between 0 and 65535"),
        (["serve", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["serve", "--log-level", "loud"], "log_level"),
        (["doctor", "--gpu-memory-gib", "nan"], "gpu_memory_gib: must be above 0"),
        (["doctor", "--arch", "sm_90a"], "arch: goes with --compile"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: Captured) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["unknown"],
        ["generate", "x", "--no-such-option"],
        ["generate", "x", "--max-tokens", "many"],
        ["serve", "--dtype", "int3"],
        ["bench"],
        ["bench", "unknown"],
    ],
)
def test_misuse_is_exit_code_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    usage, *rest = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: cupy-engine")
    assert len(rest) == 1


def test_what_is_too_much_is_told_with_the_command_s_usage(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "Hello", "there", "--frob"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: cupy-engine generate [options] TEXT"
    assert error == "cupy-engine generate: error: unrecognized arguments: there --frob"


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["serve"], ["models"], ["bench"]])
def test_help(command: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: cupy-engine" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [EngineConfig, ServerConfig, ListenConfig])
def test_every_option_of_serve_is_explained_with_its_default(kind: type, capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(kind):
        if field.name in ("model", "api_keys"):
            continue
        flag = "--" + field.name.replace("_", "-")
        entry = text.rpartition(f" {flag} ")[2].partition(" --")[0]
        assert len(entry.split()) > 3, f"{flag} has no help"
        if isinstance(field.default, int | float | str) and field.default != "":
            assert f"(default: {field.default})" in text.rpartition(f" {flag}")[2][:400], flag


def test_options_become_configuration() -> None:
    from cupy_engine.server.options import chosen

    arguments = ["serve", "m", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--api-key", "a", "--api-key", "b"]
    parsed = build_parser().parse_args([*arguments, "--strict", "--workers", "2", "--gpu-memory-utilization", "0.5"])
    engine = chosen(parsed, EngineConfig)
    assert engine == {
        "model": "m",
        "max_num_seqs": 3,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
    }
    assert chosen(parsed, ServerConfig) == {"api_keys": ["a", "b"], "strict": True}
    assert chosen(parsed, ListenConfig) == {"workers": 2}


def test_a_worker_class_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"worker_class: cannot be imported: 'no.such.Class'"):
        gunicorn_settings(ListenConfig(worker_class="no.such.Class"), 4)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (ListenConfig, {"port": "8000"}, "port: must be int, got '8000'"),
        (ListenConfig, {"host": 3}, "host: must be str, got 3"),
        (ListenConfig, {"workers": 1.5}, "workers: must be int or None, got 1.5"),
        (ServerConfig, {"strict": "no"}, "strict: must be bool, got 'no'"),
        (ServerConfig, {"api_keys": 3}, "api_keys: must be a key or a list of keys, got 3"),
        (ServerConfig, {"request_timeout_s": True}, "request_timeout_s: must be float, got True"),
        (ServerConfig, {"max_prompts": 1.5}, "max_prompts: must be int, got 1.5"),
    ],
)
def test_a_file_may_not_give_other_types(kind: type, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**options)


def test_configuration_becomes_options() -> None:
    from cupy_engine.server.options import as_arguments, chosen

    engine = {"max_num_seqs": 3, "enable_prefix_caching": False, "gpu_memory_utilization": 0.5, "tokenizer": "-a b"}
    parsed = build_parser().parse_args(["serve", "m", *as_arguments(engine)])
    assert chosen(parsed, EngineConfig) == {"model": "m", **engine}


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"cupy-engine {__version__}\n"


def test_models(default_model: ModelFiles, capsys: Captured) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert "smollm2-135m (default)  98 MB, cached at " in text
    assert "LlamaForCausalLM" in text
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["built_in"][0]["is_cached"] is True
    assert "GPT2LMHeadModel" in found["architectures"]


def test_bench_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    module = types.ModuleType("cupy_engine.bench.latency", "Measure.")
    module.add_arguments = lambda parser: parser.add_argument("--prompt-len", type=int)  # type: ignore[attr-defined]
    module.run = lambda arguments: seen.append(arguments.prompt_len) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy_engine.bench.latency", module)
    assert main(["bench", "latency", "--prompt-len", "5"]) == 7
    assert seen == [5]


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cupy_engine.server.commands import build_parser; build_parser().format_help();"
        "print(sorted({'flask', 'zmq', 'gunicorn', 'tokenizers', 'numpy', 'jinja2'} & set(sys.modules)))"
    )
    start_s = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start_s < 2
    assert out == "[]\n"


def test_a_terminal_without_the_character_is_no_crash(default_model: ModelFiles) -> None:
    command = [
        sys.executable,
        "-m",
        "cupy_engine.server.cli",
        "generate",
        "--raw",
        "1 é 2 é 3 é 4",
        "--max-tokens",
        "6",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_a_closed_pipe_is_no_crash(default_model: ModelFiles) -> None:
    command = [sys.executable, "-m", "cupy_engine.server.cli", "generate", "--max-tokens", "60", "Tell me a story."]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 1
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("module", ["cupy_engine.server.commands", "argparse", "msgspec", "numpy"])
def test_ctrl_c_while_the_command_imports(module: str) -> None:
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
from cupy_engine.server.cli import main
sys.exit(main(["models"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")
