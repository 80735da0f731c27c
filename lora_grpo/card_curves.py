"""A run's curves as one picture: reward, accuracy and format, and length, by step."""

import os
import shutil
from pathlib import Path
from typing import Any

from lora_grpo.atomic import STAGED
from lora_grpo.card_records import Records

CURVES = "curves.png"
BLUE, ORANGE, GREY = "#1f6fb4", "#d9730d", "#5f6b76"
Row = dict[str, Any]


def write_curves(records: Records, folder: Path) -> bool:
    """Write `curves.png` into the folder and tell whether there is one.

    Drawn from the metrics, or copied from the run that had more to draw from. The same metrics give
    the same bytes.
    """
    drawn = records.folder / CURVES
    if folder != records.folder and drawn.is_file():
        shutil.copyfile(drawn, folder / CURVES)
        return True
    if not records.metrics:
        return False
    staged = folder / f"{STAGED}{CURVES}"
    draw(records.metrics, records.validation, staged)
    os.replace(staged, folder / CURVES)
    return True


def draw(metrics: list[Row], validation: list[Row], path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    reward, shares, length = figure.subplots(3, sharex=True)
    plot(reward, metrics, "reward", BLUE, "reward")
    plot(shares, metrics, "correct", BLUE, "correct, in training", scale=100)
    plot(shares, metrics, "format", ORANGE, "format, in training", scale=100)
    if validation:
        mark = {"marker": "o", "linestyle": "--"}
        plot(shares, validation, "strict_accuracy", BLUE, "correct, validation", 100, **mark)
        plot(shares, validation, "format_rate", ORANGE, "format, validation", 100, **mark)
    plot(length, metrics, "completion_length", GREY, "completion length")
    reward.set_ylabel("mean reward")
    shares.set(ylabel="share of completions, %", ylim=(-3, 103))
    length.set(ylabel="mean length, tokens", xlabel="step")
    length.set_ylim(bottom=0)
    shares.legend(loc="lower right", fontsize=8)
    for axes in (reward, shares, length):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})


def plot(
    axes: Any, rows: list[Row], key: str, colour: str, label: str, scale: float = 1, **style: Any
) -> None:
    found = [row for row in rows if row.get(key) is not None]
    steps, values = [row["step"] for row in found], [scale * row[key] for row in found]
    alone = {"marker": "o"} if len(found) == 1 else {}
    axes.plot(steps, values, color=colour, label=label, **{**alone, **style})
