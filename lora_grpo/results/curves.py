"""A run's curves as one picture: reward, accuracy and format, and length, by step.

What is sampled in training and what is answered greedily are told apart, the base is a line, and
the step that was kept is marked.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from lora_grpo.machine.files import STAGED
from lora_grpo.results.records import Records, short_name

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
    draw(records, staged)
    os.replace(staged, folder / CURVES)
    return True


def draw(records: Records, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics, validation, found = records.metrics, records.validation, records.evaluation
    figure = Figure(figsize=(8, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(records), fontsize=11)
    reward, shares, length = figure.subplots(3, sharex=True, height_ratios=(2, 3, 2))
    plot(reward, metrics, "reward", BLUE, "reward")
    plot(shares, metrics, "correct", BLUE, "correct, sampled in training", scale=100)
    plot(shares, metrics, "format", ORANGE, "format, sampled in training", scale=100)
    if validation:
        mark = {"marker": "o", "linestyle": "--"}
        greedy = "greedy, validation problems"
        plot(shares, validation, "strict_accuracy", BLUE, f"correct, {greedy}", 100, **mark)
        plot(shares, validation, "format_rate", ORANGE, f"format, {greedy}", 100, **mark)
    if found:
        base, label = 100 * found["base"]["strict_accuracy"], "correct, greedy, base on the test"
        shares.axhline(base, color=BLUE, linestyle=":", label=label)
    plot(length, metrics, "completion_length", GREY, "completion length")
    reward.set_ylabel("mean reward")
    shares.set(ylabel="share of completions, %", ylim=(-3, 103))
    length.set(ylabel="mean length, tokens", xlabel="step")
    length.set_ylim(bottom=0)
    for axes in (reward, shares, length):
        if "best_step" in found:
            kept = f"step {found['best_step']}, the adapter that was kept"
            axes.axvline(found["best_step"], color=GREY, linewidth=1, alpha=0.6, label=kept)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, format="png", metadata={"Software": None})


def title(records: Records) -> str:
    """Return what was trained on what, as far as the records tell."""
    base = records.base.name if records.base else "a base"
    dataset = short_name(records.trained.get("dataset", "its data"))
    return f"GRPO with LoRA: {base} on {dataset}"


def plot(
    axes: Any, rows: list[Row], key: str, colour: str, label: str, scale: float = 1, **style: Any
) -> None:
    found = [row for row in rows if row.get(key) is not None]
    steps, values = [row["step"] for row in found], [scale * row[key] for row in found]
    alone = {"marker": "o"} if len(found) == 1 else {}
    axes.plot(steps, values, color=colour, label=label, **{**alone, **style})
