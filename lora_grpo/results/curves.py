"""A run's curves as one picture, by step: reward, accuracy and format, and completion length.

Sampled figures are solid lines, greedy ones on the validation problems are dashed.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from lora_grpo.machine.files import STAGED
from lora_grpo.results.records import Records, short_name

CURVES = "curves.png"
BLUE, ORANGE, GREY = "#1f6fb4", "#d9730d", "#5f6b76"


def write_curves(records: Records, folder: Path) -> bool:
    """Write `curves.png` into the folder and return whether there is one.

    Drawn from the metrics, or copied from the run's folder. The same metrics give the same bytes.
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
    base = records.base.name if records.base else "a base"
    dataset = short_name(records.trained.get("dataset", "its data"))
    figure.suptitle(f"GRPO with LoRA: {base} on {dataset}", fontsize=11)
    reward, shares, length = figure.subplots(3, sharex=True, height_ratios=(2, 3, 2))
    plot(reward, metrics, "reward", BLUE)
    plot(length, metrics, "completion_length", GREY)
    for sampled, greedy, colour in (
        ("correct", "strict_accuracy", BLUE),
        ("format", "format_rate", ORANGE),
    ):
        plot(shares, metrics, sampled, colour, 100, label=f"{sampled}, sampled in training")
        if validation:
            label = f"{sampled}, greedy, validation problems"
            plot(shares, validation, greedy, colour, 100, label=label, marker="o", linestyle="--")
    if found:
        accuracy, label = (
            100 * found["base"]["strict_accuracy"],
            "correct, greedy, base on the test",
        )
        shares.axhline(accuracy, color=BLUE, linestyle=":", label=label)
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


def plot(
    axes: Any, rows: list[dict[str, Any]], key: str, colour: str, scale: float = 1, **style: Any
) -> None:
    found = [row for row in rows if row.get(key) is not None]
    if len(found) == 1:
        style["marker"] = "o"  # a line of one point is invisible
    steps, values = [row["step"] for row in found], [scale * row[key] for row in found]
    axes.plot(steps, values, color=colour, **style)
