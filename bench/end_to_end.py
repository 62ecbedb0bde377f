"""The server as its clients see it: requests per second, TTFT and ITL over HTTP.

Starts `cupy-engine serve` with the options given, or takes a running server of any maker (--url). A closed loop of
streaming clients, each asking again when its answer has ended, or (--request-rate) arrivals by chance. No request
begins after --duration; rates are over the time until the last answer ends. Clients are processes of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cupy_engine.server.cli import main
from cupy_engine.server.listen_config import ListenConfig
from cupy_engine.server.options import add_options, as_arguments, chosen
from cupy_engine.server.server_config import ServerConfig

from cupy_engine.errors import EngineError

from .fake_server import fake_server
from .load import Load, Target, default_num_processes, run_load, summarize
from .option_types import amount, count, percentile
from .report import Figures, Report, Row, add_output_arguments, check_output, emit, plain, table
from .served import running_server, started_server
from .server_process import orderly_end
from .setup import add_engine_arguments, engine_options

_WARM_UP_CLIENTS = 8  # where the number of clients is left to chance
_WARM_UP_TOKENS = 8
_CHECK_S, _CHECK_ITL_S = 3.0, 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cupy-engine bench serve``."""
    load = parser.add_argument_group("load")
    load.add_argument("--url", help="measure this server, such as http://127.0.0.1:8000, instead of starting one")
    load.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="for --url (or OPENAI_API_KEY)")
    load.add_argument(
        "--concurrent-requests",
        type=count,
        nargs="+",
        default=[1, 32],
        metavar="C",
        help="clients; several numbers are measured one after the other (default: 1 32)",
    )
    load.add_argument(
        "--request-rate", type=amount, nargs="+", metavar="R", help="requests a second, by chance, instead of clients"
    )
    load.add_argument("--duration", type=amount, default=15.0, metavar="S", help="seconds of each load (default: 15)")
    load.add_argument(
        "--input-len", type=count, default=396, help="words of a prompt, about as many tokens (default: 396)"
    )
    load.add_argument("--output-len", type=count, default=128, help="tokens to generate (default: 128)")
    load.add_argument(
        "--percentiles", type=percentile, nargs="+", default=[50, 99], metavar="P", help="(default: 50 99)"
    )
    load.add_argument(
        "--client-processes", type=count, metavar="N", help="(default: a quarter of the cores, at most 8)"
    )
    load.add_argument(
        "--check-client",
        action="store_true",
        help="first measure the clients alone, against a server that only sends",
    )
    add_output_arguments(parser)
    add_options(parser.add_argument_group("server"), ListenConfig, skip=("host", "port"))
    add_options(parser.add_argument_group("requests"), ServerConfig, skip=("api_keys",))
    add_engine_arguments(parser, defaults={})


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    check_output(arguments)
    loads = list(_loads(arguments))
    about: dict[str, Any] = {
        "input_words": arguments.input_len,
        "output_len": arguments.output_len,
        "duration_s": arguments.duration,
    }
    if arguments.check_client:
        about["client_check"] = _check_clients(arguments, loads)
    rows = []
    with orderly_end(), _server(arguments) as (target, start):
        for load in loads:
            run_load(target, _warm_up(load), _num_processes(arguments, load))
            rows.append(Row(load.describe(), _measure(arguments, target, load)))
    title = f"{target.model} over HTTP: {arguments.input_len} words → {arguments.output_len} tokens, "
    title += f"{arguments.duration:g} s each"
    title += "".join(f", {name.removesuffix('_s').replace('_', ' ')} after {s:.1f} s" for name, s in start.items())
    emit(Report(title, {"model": target.model, **about, **start}, rows), arguments, as_table=True)
    return 0


def _loads(arguments: argparse.Namespace) -> Iterator[Load]:
    size = {"duration_s": arguments.duration, "prompt_words": arguments.input_len, "output_len": arguments.output_len}
    if arguments.request_rate:
        for index, rate in enumerate(arguments.request_rate, 1):
            yield Load(num_clients=0, request_rate=rate, seed=2 * index, **size)
        return
    for index, num_clients in enumerate(arguments.concurrent_requests, 1):
        yield Load(num_clients=num_clients, seed=2 * index, **size)


def _warm_up(load: Load) -> Load:
    """One short answer for each client."""
    num_clients = load.num_clients or _WARM_UP_CLIENTS
    return replace(
        load,
        num_clients=num_clients,
        request_rate=None,
        duration_s=0.01,
        output_len=_WARM_UP_TOKENS,
        seed=load.seed + 1,
    )


def _measure(arguments: argparse.Namespace, target: Target, load: Load) -> Figures:
    answers, cpu_share = run_load(target, load, _num_processes(arguments, load))
    failed = [answer.error for answer in answers if answer.error is not None]
    if len(failed) == len(answers):
        raise EngineError(f"no request was answered: {failed[0] if failed else 'none was sent'}")
    return summarize(answers, arguments.percentiles) | {"client_cpu": cpu_share}


def _check_clients(arguments: argparse.Namespace, loads: list[Load]) -> list[dict[str, Any]]:
    """The same loads against a server that only sends, one token to each client every so often.

    If the clients keep up, that is the ITL they see.
    """
    rows = []
    for load in loads:
        num_processes = _num_processes(arguments, load)
        with fake_server(load.output_len, _CHECK_ITL_S, _CHECK_ITL_S, num_processes) as target:
            figures = _measure(arguments, target, replace(load, duration_s=_CHECK_S))
        rows.append(Row(load.describe(), figures))
    if arguments.json != "-":
        print(f"clients alone, against a server that sends each of them a token every {_CHECK_ITL_S * 1e3:g} ms")
        print(table(rows), flush=True)
    return [plain(row) for row in rows]


def _num_processes(arguments: argparse.Namespace, load: Load) -> int:
    return int(arguments.client_processes or default_num_processes(load.num_clients or _WARM_UP_CLIENTS))


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[tuple[Target, dict[str, float]]]:
    """The server to measure, and how long it took to start, in seconds."""
    if arguments.url:
        yield running_server(arguments.url, arguments.api_key), {}
        return
    with engine_options(arguments, {}) as options:
        server = chosen(arguments, ListenConfig) | chosen(arguments, ServerConfig)
        with started_server(options.pop("model"), as_arguments(options | server)) as started:
            yield started


if __name__ == "__main__":
    sys.exit(main(["bench", "serve", *sys.argv[1:]]))
