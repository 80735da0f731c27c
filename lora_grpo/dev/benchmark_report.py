"""What the measured runs come to: medians, spreads and ratios as Markdown tables, and a plot."""

import statistics
from pathlib import Path
from typing import Any

from lora_grpo.dev.benchmark_cases import PEFT, PROJECT, PROVEN, TRL

Run = dict[str, Any]
NAMES = {PROJECT: "this project", TRL: "plain TRL", PEFT: "PEFT", PROVEN: "this project, proven"}
PHASES = ("generate", "update", "other")
COLOURS = {"generate": "#1f6fb4", "update": "#d9730d", "other": "#9aa4ad"}
LABELS = {"g": "completions of a prompt", "p": "prompt, tokens", "t": "completion, tokens"}
GB = 1e9


def summarise_side(runs: list[Run]) -> dict[str, Any]:
    """Return a side's median step with its spread, its phases, its peak; a run's sum for learning.

    `runs` are the repetitions of one case by one side.
    """
    learning = "accuracies" in runs[0]
    timed = [dict(row) for run in runs for row in run["rows"]]
    if learning:
        timed = [{"seconds": sum(row["seconds"] for row in run["rows"])} for run in runs]
    seconds = [row["seconds"] for row in timed]
    found = {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "count": len(seconds),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "micro_batches": runs[0].get("micro_batches"),
    }
    if "generate" in timed[0]:
        for row in timed:
            row["other"] += row.pop("reward", 0.0)
        found |= {name: statistics.median(row[name] for row in timed) for name in PHASES}
        found["tokens_per_second"] = statistics.median(r["tokens"] / r["seconds"] for r in timed)
    if learning:
        found["steps"] = [len(run["rows"]) for run in runs]
    return found


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Return for each measured case its title, targets, sides and ratios, in the runs' order."""
    cases: dict[str, dict[str, Any]] = {}
    for run in runs:
        case = cases.setdefault(run["case"]["name"], {**run["case"], "runs": {}})
        case["runs"].setdefault(run["side"], []).append(run)
    found = []
    for case in cases.values():
        by_side = case.pop("runs")
        sides = {side: summarise_side(by_side[side]) for side in NAMES if side in by_side}
        other = next((side for side in (TRL, PEFT) if side in sides), None)
        ratios = {}
        if PROJECT in sides and other:
            mine, theirs = sides[PROJECT], sides[other]
            ratios = {name: mine[name] / theirs[name] for name in ("seconds", "peak_bytes")}
        found.append({**case, "sides": sides, "ratios": ratios})
    return found


def format_seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def build_row(case: dict[str, Any], side: str) -> list[str]:
    """Return a line of the table of times."""
    found = case["sides"][side]
    spread = f"{format_seconds(found['least'])} to {format_seconds(found['most'])}"
    phases = [format_seconds(found[name]) if name in found else "" for name in PHASES]
    speed = f"{found['tokens_per_second']:.0f}" if "tokens_per_second" in found else ""
    median = f"{format_seconds(found['seconds'])} ({spread}, n {found['count']})"
    if "steps" in found:
        median += f"; {', '.join(map(str, found['steps']))} steps"
    peak = f"{found['peak_bytes'] / GB:.2f}"
    return [case["title"], NAMES[side], median, *phases, speed, peak]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first two columns are text."""
    marks = ["---" if index < 2 else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))


def build_tables(cases: list[dict[str, Any]]) -> str:
    """Return the table of times and the table of ratios, as Markdown."""
    phases = [f"{name}, s" for name in PHASES]
    seconds = "seconds, median (least to most)"
    header = ["case", "side", seconds, *phases, "tokens/s", "peak, GB"]
    times = markdown(header, [build_row(case, side) for case in cases for side in case["sides"]])
    rows = []
    for case in cases:
        for name, word in (("seconds", "time"), ("peak_bytes", "peak memory")):
            if name not in case["ratios"]:
                continue
            ratio, target = case["ratios"][name], case["targets"].get(name)
            met = "" if target is None else "met" if round(ratio, 2) <= target else "missed"
            aimed = "" if target is None else f"{target:g}"
            rows.append([case["title"], word, f"{ratio:.2f}", aimed, met])
    ratios = markdown(["case", "ratio of", "this project / other", "at most", ""], rows)
    return f"{times}\n\n{ratios}"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Write a picture: a step's phases of both sides, and how cost grows where sizes double."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [case for case in cases if case["kind"] == "steps" and case["ratios"]]
    scaling = [case for case in steps if case["name"].startswith("scaling-")]
    figure = Figure(figsize=(9, 7 if scaling else 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = [["bars"] * len(LABELS), list(LABELS)] if scaling else [["bars"]]
    axes = figure.subplot_mosaic(rows)
    draw_bars(axes["bars"], [case for case in steps if case not in scaling])
    for letter in LABELS if scaling else ():
        draw_growth(axes[letter], scaling, letter)
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_bars(axes: Any, cases: list[dict[str, Any]]) -> None:
    """Draw each case's step as a share of plain TRL's, phase on phase."""
    labels, at = [], 0
    for case in cases:
        whole = case["sides"][TRL]["seconds"]
        for side in (TRL, PROJECT):
            start = 0.0
            for phase in PHASES:
                share = case["sides"][side][phase] / whole
                axes.barh(at, share, left=start, color=COLOURS[phase])
                start += share
            labels.append(f"{case['title']}\n{NAMES[side]}")
            at += 1
    axes.set_yticks(range(at), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("a step's time, plain TRL = 1")
    if cases:
        axes.legend(axes.patches[: len(PHASES)], PHASES, fontsize=8)
    tidy(axes)


def draw_growth(axes: Any, cases: list[dict[str, Any]], letter: str) -> None:
    """Draw the cases that differ from the first in the quantity of this letter alone."""
    sizes = {case["name"]: read_sizes(case["name"]) for case in cases}
    first = sizes[cases[0]["name"]]
    line = [
        case
        for case in cases
        if all(sizes[case["name"]][other] == first[other] for other in LABELS if other != letter)
    ]
    for side, colour in ((TRL, COLOURS["other"]), (PROJECT, COLOURS["generate"])):
        points = [(sizes[c["name"]][letter], c["sides"][side]["seconds"]) for c in line]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=NAMES[side])
    axes.set(xlabel=LABELS[letter], ylim=(0, None))
    axes.set_xticks([sizes[c["name"]][letter] for c in line])
    if letter == "g":
        axes.set_ylabel("update, seconds")
        axes.legend(fontsize=8)
    tidy(axes)


def read_sizes(name: str) -> dict[str, int]:
    """Return G, prompt and completion length from a name such as scaling-g4-p128-t64."""
    return {part[0]: int(part[1:]) for part in name.split("-")[1:]}


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
