"""Figures and how they are shown: as text, as JSON, as a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from cupy_engine.errors import ConfigError

from .plot import require_matplotlib, save_plot

_PERCENTILE = re.compile(r"(\w+_s)_p(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several runs and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))


Figures = dict[str, float | Figure]


@dataclass(frozen=True, slots=True)
class Quantity:
    """How a figure is shown: its ``label``, and its value times ``scale`` in ``unit``; whether it is worth drawing."""

    label: str
    unit: str
    scale: float = 1.0
    is_drawn: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one system, or under one load."""

    name: str
    figures: Figures


@dataclass(frozen=True, slots=True)
class Report:
    """Rows of figures by name (the names of :data:`QUANTITIES`), and under what circumstances they came about."""

    title: str
    about: dict[str, Any]
    rows: list[Row]


_MS, _MIB, _PERCENT = 1e3, 1 / (1 << 20), 1e2
QUANTITIES = {
    "output_tokens_per_s": Quantity("output", "tokens/s"),
    "total_tokens_per_s": Quantity("input + output", "tokens/s"),
    "requests_per_s": Quantity("requests", "1/s"),
    "decode_tokens_per_s": Quantity("decode", "tokens/s"),
    "decode_step_s": Quantity("decode step", "ms", _MS),
    "ttft_s": Quantity("TTFT", "ms", _MS),
    "time_per_output_token_s": Quantity("TPOT", "ms", _MS),
    "itl_s": Quantity("ITL", "ms", _MS),
    "latency_s": Quantity("latency", "ms", _MS),
    "host_overhead": Quantity("outside the ops", "%", _PERCENT),
    "gpu_busy_events": Quantity("GPU busy, events", "%", _PERCENT),
    "gpu_busy_nvml": Quantity("GPU busy, NVML", "%", _PERCENT),
    "host_turn_s": Quantity("host's turn", "ms", _MS),
    "host_work_s": Quantity("host's work", "ms", _MS),
    "host_schedule_s": Quantity("- schedule", "ms", _MS),
    "host_submit_s": Quantity("- submit", "ms", _MS),
    "host_update_s": Quantity("- update", "ms", _MS),
    "weight_bytes": Quantity("weights", "MiB", _MIB),
    "kv_cache_bytes": Quantity("KV cache", "MiB", _MIB),
    "workspace_bytes": Quantity("workspace", "MiB", _MIB),
    "graph_bytes": Quantity("graphs", "MiB", _MIB),
    "gpu_bytes": Quantity("GPU, all", "MiB", _MIB),
    "limit_bytes": Quantity("GPU, limit", "MiB", _MIB),
    "host_bytes": Quantity("host, loaded", "MiB", _MIB),
    "host_peak_bytes": Quantity("host, peak", "MiB", _MIB),
    "kv_blocks_used": Quantity("blocks used", "%", _PERCENT),
    "kv_places_filled": Quantity("places filled", "%", _PERCENT),
    "kv_waste": Quantity("waste in blocks", "%", _PERCENT),
    "num_preemptions": Quantity("preemptions", ""),
    "num_requests": Quantity("finished", "", is_drawn=False),
    "num_failed": Quantity("failed", "", is_drawn=False),
    "prompt_tokens": Quantity("prompt", "tokens", is_drawn=False),
    "client_cpu": Quantity("client CPU", "%", _PERCENT, is_drawn=False),
}


def quantity(name: str) -> Quantity:
    """``ttft_s_p99`` is the 99th percentile of ``ttft_s``."""
    if match := _PERCENTILE.fullmatch(name):
        base = QUANTITIES[match[1]]
        return Quantity(f"{base.label} p{match[2]}", base.unit, base.scale)
    return QUANTITIES[name]


def percentiles(name: str, values: Sequence[float], which: Sequence[float]) -> Figures:
    """Figures ``<name>_p<percentile>``; none of no values."""
    if not len(values):
        return {}
    return {f"{name}_p{p:g}": float(np.percentile(values, p)) for p in which}


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the report goes besides the terminal."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it instead of text"
    )
    group.add_argument("--plot", metavar="FILE.png", help="draw the figures (extra 'bench')")


def check_output(arguments: argparse.Namespace) -> None:
    """Find out before anything is measured that it could not be drawn or kept.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written there.
    """
    if arguments.plot:
        require_matplotlib()
    for option in ("json", "plot"):
        path = getattr(arguments, option)
        if path not in (None, "-"):
            _check_writable(option, Path(path))


def _check_writable(option: str, path: Path) -> None:
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(option, f"cannot write {str(path)!r}: {error.strerror}") from None


def emit(report: Report, arguments: argparse.Namespace, *, as_table: bool = False) -> None:
    """Print, write and draw what the command line asks for."""
    if arguments.json == "-":
        print(as_json(report))
    else:
        print(report.title)
        print(table(report.rows) if as_table else "\n".join(map(block, report.rows)))
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(as_json(report) + "\n")
    if arguments.plot:
        save_plot(report.title, _panels(report.rows), Path(arguments.plot))


def as_json(report: Report) -> str:
    """One document: the circumstances, then ``results``, a list of rows."""
    about = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"}
    return json.dumps(about | report.about | {"results": [plain(row) for row in report.rows]}, indent=2)


def plain(row: Row) -> dict[str, Any]:
    """A row for JSON."""
    return {"name": row.name} | {k: asdict(v) if isinstance(v, Figure) else v for k, v in row.figures.items()}


def block(row: Row) -> str:
    """A row as lines, one per figure."""
    return "\n".join([row.name, *(_line(quantity(name), value) for name, value in row.figures.items())])


def table(rows: Sequence[Row]) -> str:
    """Rows under common headings."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    shown = [quantity(name) for name in names]
    lines = [["", *(q.label for q in shown)], ["", *(q.unit for q in shown)]]
    for row in rows:
        cells = [row.figures.get(name) for name in names]
        lines.append([row.name, *(_cell(q, value) for q, value in zip(shown, cells, strict=True))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def _line(what: Quantity, value: float | Figure) -> str:
    median = value.median if isinstance(value, Figure) else value
    line = f"  {what.label:<17} {_number(median * what.scale):>8} {what.unit:<8}"
    if not isinstance(value, Figure):
        return line.rstrip()
    return f"{line} ({_number(value.low * what.scale)} – {_number(value.high * what.scale)})"


def _cell(what: Quantity, value: float | Figure | None) -> str:
    if value is None:
        return "–"
    return _number((value.median if isinstance(value, Figure) else value) * what.scale)


def _panels(rows: Sequence[Row]) -> dict[str, list[tuple[str, float, float, float]]]:
    """For each quantity that is shown: (row, median, low, high) in its unit."""
    panels: dict[str, list[tuple[str, float, float, float]]] = {}
    for row in rows:
        for name, value in row.figures.items():
            what = quantity(name)
            if not what.is_drawn:
                continue
            f = value if isinstance(value, Figure) else Figure(value, value, value)
            bar = (row.name, f.median * what.scale, f.low * what.scale, f.high * what.scale)
            panels.setdefault(f"{what.label}, {what.unit}".rstrip(", "), []).append(bar)
    return panels


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
