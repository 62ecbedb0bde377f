"""Figures as bars."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cupy_engine.errors import ConfigError

Bar = tuple[str, float, float, float]  # label, median, lowest, highest

_NUM_COLUMNS = 3
_PANEL_INCHES = (4.2, 2.6)


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plot", "needs matplotlib: pip install 'cupy-engine[bench]'")


def save_plot(title: str, panels: dict[str, list[Bar]], file: Path) -> None:
    """One panel per quantity, a bar per row, whiskers from the lowest to the highest run.

    Raises:
        ConfigError: the file's suffix is none that matplotlib can write.
    """
    from matplotlib.figure import Figure

    num_rows = -(-len(panels) // _NUM_COLUMNS)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * min(len(panels), _NUM_COLUMNS), height * num_rows), layout="constrained")
    figure.suptitle(title)
    for index, (quantity, bars) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(num_rows, min(len(panels), _NUM_COLUMNS), index)
        labels, medians, lows, highs = zip(*bars, strict=True)
        below = [median - low for median, low in zip(medians, lows, strict=True)]
        above = [high - median for median, high in zip(medians, highs, strict=True)]
        whiskers = (below, above) if any(below + above) else None
        axes.barh(labels, medians, xerr=whiskers, color="#4c78a8", ecolor="#333333", capsize=3)
        axes.invert_yaxis()
        axes.set_title(quantity, fontsize=10)
        axes.tick_params(labelsize=8)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise ConfigError("plot", str(error)) from None
