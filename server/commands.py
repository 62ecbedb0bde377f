"""The commands of ``cupy-engine`` and their options."""

from __future__ import annotations

import argparse

from cupy_engine import __version__
from cupy_engine.config import EngineConfig
from cupy_engine.sampling_params import SamplingParams

from .listen_config import ListenConfig
from .options import add_options
from .server_config import ServerConfig

DEFAULT_MODEL = EngineConfig.model
MODEL_HELP = "built-in name, folder, .gguf file or hub id (default: %(default)s)"
CLI_SAMPLING_DEFAULTS = {"temperature": 0.0, "max_tokens": 512}
PLANNED_OPTIONS = (
    *("dtype", "device", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_blocks"),
    *("kv_cache_memory_bytes", "gpu_memory_utilization"),
)
_NOT_ON_A_TERMINAL = {"logprobs", "prompt_logprobs", "truncate_prompt_tokens", "allowed_token_ids", "logit_bias"}


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cupy-engine", description="Run and serve large language models.", formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"cupy-engine {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_models(commands)
    _add_doctor(commands)
    _add_bench(commands)
    return parser


Commands = argparse._SubParsersAction  # the type has no public name


def _command(
    commands: Commands[argparse.ArgumentParser], name: str, run: str, text: str, operand: str = ""
) -> argparse.ArgumentParser:
    usage = f"cupy-engine {name} [options] {operand}".rstrip()  # not all sixty of them before every error
    parser = commands.add_parser(name, usage=usage, help=text, description=text, formatter_class=_Formatter)
    parser.set_defaults(run=run, misused=parser.error)
    return parser


def _add_generate(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "Answer a question or continue a text."
    parser = _command(commands, "generate", ".generate:generate", text, "TEXT")
    parser.add_argument("text", metavar="TEXT", help="what to answer; - reads standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_model_and_sampling(parser)


def _add_chat(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "Talk with a model in the terminal. /reset forgets, /quit or Ctrl-D leaves, Ctrl-C stops a reply."
    parser = _command(commands, "chat", ".chat:chat", text)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    _add_model_and_sampling(parser)


def _add_serve(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "serve", ".serve:run", "Serve models over HTTP, in OpenAI's dialect.", "[MODEL]")
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=DEFAULT_MODEL,
        help=MODEL_HELP,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with [[models]] to serve, instead of one model")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="engine processes (default: %(default)s)")
    add_options(parser.add_argument_group("listening"), ListenConfig)
    requests = parser.add_argument_group("requests")
    for kind, what in (("api", "clients must send"), ("admin", "may load and unload models, too")):
        requests.add_argument(
            f"--{kind}-key",
            dest=f"{kind}_keys",
            action="append",
            default=argparse.SUPPRESS,
            metavar="KEY",
            help=f"a key that {what}; may be repeated; better in CUPY_ENGINE_{kind.upper()}_KEY, out of sight of ps",
        )
    add_options(requests, ServerConfig, skip=("api_keys", "admin_keys"))
    add_options(parser.add_argument_group("engine"), EngineConfig, skip=("model",))


def _add_models(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "List built-in models, what of them is cached, and the architectures that can be run."
    parser = _command(commands, "models", ".models:models", text)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "Say what this machine has for the engine, what is missing, and how a model would fit into its memory."
    parser = _command(commands, "doctor", ".doctor:doctor", text)
    parser.add_argument("-m", "--model", help="plan memory for this model: built-in name, folder, .gguf file or hub id")
    parser.add_argument(
        "--gpu-memory-gib", type=float, metavar="X", help="plan for a GPU with this much memory instead of those here"
    )
    add_options(parser.add_argument_group("engine"), EngineConfig, only=PLANNED_OPTIONS)
    parser.add_argument(
        "--compile", action="store_true", help="build every kernel; fail on errors and spilled registers"
    )
    parser.add_argument(
        "--arch", action="append", metavar="ARCH", help="with --compile: for this architecture only; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "Measure speed."
    parser = commands.add_parser("bench", help=text, description=text, formatter_class=_Formatter)
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, help_text in (
        ("throughput", "output tokens per second of many requests at once"),
        ("latency", "time to first token and per token"),
        ("serve", "requests per second and latencies of the server, over HTTP"),
        ("memory", "where memory goes, and how much of the KV cache is put to use"),
        ("host", "the engine's own work per step, without a GPU"),
        ("kernels", "GPU kernels beside their limits"),
    ):
        one = kinds.add_parser(name, help=help_text, description=help_text, formatter_class=_Formatter, add_help=False)
        one.set_defaults(run=".bench:bench", benchmark=name)


def _add_model_and_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        help=MODEL_HELP,
    )
    sampling = parser.add_argument_group("sampling")
    add_options(sampling, SamplingParams, skip=_NOT_ON_A_TERMINAL, defaults=CLI_SAMPLING_DEFAULTS)
    add_options(parser.add_argument_group("engine"), EngineConfig, skip=("model", "seed"))
