"""This project and plain TRL on the same work, in alternation, each in a process of its own.

Every finished run is in the results file before the next one begins, so that a benchmark that was
stopped continues where it was. Nothing heavy is imported here.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from lora_grpo.machine.files import write_json
from lora_grpo.machine.hardware import find_gpu, total_memory
from lora_grpo.machine.process import run_alone
from lora_grpo.machine.terminal import FailedError

PROJECT, TRL, PEFT, PROVEN = "this project", "plain TRL", "PEFT", "this project, proven"
PHASES = ("generate", "update", "other")
Name = Literal[
    "all", "embedded", "smollm2", "smollm2-half-dead", "qwen-update", "learning", "scaling", "merge"
]
# Completions, tokens of the prompt, tokens of a completion: one of them doubles at a time.
SCALING = (
    *((4, 128, 64), (8, 128, 64), (16, 128, 64)),
    *((4, 256, 64), (4, 512, 64), (4, 128, 128), (4, 128, 256)),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Compare this project with plain TRL's GRPOTrainer: seconds per step by phase, peak memory.

    Without a hub give --smollm2, --qwen and --gsm8k as folders; embedded and learning need none.
    Exit status: 0 measured, 1 a run failed, 2 bad input.
    """

    cases: Positional[Annotated[tuple[Name, ...], arg(metavar="CASE")]] = ("embedded",)
    """What to compare; all of them need about an hour and a half on two cores."""
    smollm2: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Model of `smollm2`, `smollm2-half-dead` and `scaling`: a Hub id or a folder."""
    qwen: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Model of `qwen-update` and `merge`; only its shape matters."""
    gsm8k: str = "openai/gsm8k:main"
    """Dataset of `smollm2` and `smollm2-half-dead`: a Hub id, a file or a folder."""
    steps: int = 5
    """Steps of each process that count."""
    warmup_steps: int = 1
    """Steps before them that do not."""
    rounds: int = 2
    """Processes of each side, which take turns."""
    json: Path | None = None
    """Results file; what is in it already is not measured again."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least {least}, got {getattr(self, name)}")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ValueError(f"--json {self.json}: there is no folder {self.json.parent}")
        for name in ("smollm2", "qwen"):
            folder = Path(getattr(self, name)).expanduser()
            if folder.is_dir() and not (folder / "config.json").is_file():
                raise ValueError(f"--{name} {folder} has no config.json: give a model's folder")


@dataclass(frozen=True)
class Case:
    """One comparison; `flags` are those of the training command.

    `steps` times GRPO steps, `learning` a run until the adapter answers well, `merge` a merge. With
    `lengths` (prompt, completion) both sides get the same random tokens instead of sampling, so
    that a step is the update alone. `signal` says which groups have rewards that differ: as the
    run's own rewards fall, or by a reward made for it. `targets` are ratios to the other side.
    """

    title: str
    flags: tuple[str, ...]
    kind: Literal["steps", "learning", "merge"] = "steps"
    signal: Literal["own", "every group", "half of the groups"] = "own"
    lengths: tuple[int, int] | None = None
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        return (PROJECT, PEFT, PROVEN) if self.kind == "merge" else (PROJECT, TRL)


def in_float32(model: str, prompts: int, generations: int, length: int) -> tuple[str, ...]:
    """Return the flags of a run in float32, one group per micro-batch."""
    return (
        *("--no-load-in-4bit", "--model", model, "--max-completion-length", str(length)),
        *("--num-generations", str(generations), "--per-device-train-batch-size", str(generations)),
        *("--gradient-accumulation-steps", str(prompts)),
    )


def update_alone(model: str, generations: int, prompt: int, length: int, **more: Any) -> Case:
    """Return the case of one group, of which only the update is timed."""
    title = more.pop("title", "") + f"1 x ({prompt} + {generations} x {length})"
    flags = (*in_float32(model, 1, generations, length), "--dataset", "arithmetic")
    return Case(title, flags, signal="every group", lengths=(prompt, length), **more)


def find_cases(config: BenchmarkConfig) -> list[Case]:
    """Return the cases asked for, with their models and dataset."""
    on_gsm8k = (*in_float32(config.smollm2, 4, 8, 96), "--dataset", config.gsm8k)
    tiny = ("--preset", "tiny")
    half, better = {"seconds": 0.5, "peak_bytes": 0.5}, {"seconds": 0.4, "peak_bytes": 0.4}
    smollm2, until = "SmolLM2-135M on GSM8K, 4 x 8 x 96", "steps until 0.90 of 256 problems"
    cases = {
        "embedded": [Case("embedded model, 16 x 8 x 64", tiny)],
        "smollm2": [Case(smollm2, on_gsm8k, signal="every group", targets=half)],
        "smollm2-half-dead": [
            Case(
                f"{smollm2}, half of the groups dead",
                on_gsm8k,
                signal="half of the groups",
                targets={"seconds": 0.35},
            )
        ],
        "qwen-update": [
            update_alone(
                config.qwen, 8, 256, 64, title="Qwen2.5-0.5B, update alone, ", targets=better
            )
        ],
        "learning": [
            Case(f"embedded model, {until}", tiny, kind="learning", targets={"seconds": 0.6})
        ],
        "scaling": [update_alone(config.smollm2, *sizes) for sizes in SCALING],
        "merge": [
            Case(
                "merging into Qwen2.5-0.5B",
                ("--model", config.qwen),
                kind="merge",
                targets={"seconds": 1.0, "peak_bytes": 0.35},
            )
        ],
    }
    chosen = cases if "all" in config.cases else config.cases
    return [case for name in chosen for case in cases[name]]


def list_specs(config: BenchmarkConfig) -> list[Row]:
    """Return what is asked of each process, in the order of their turns: the sides swap places in
    every second round."""
    sizes = {"steps": config.steps, "warmup_steps": config.warmup_steps}
    return [
        {"case": json.loads(json.dumps(asdict(case))), "side": side, "seed": number, **sizes}
        for case in find_cases(config)
        for number in range(config.rounds)
        for side in (case.sides if number % 2 == 0 else reversed(case.sides))
    ]


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    from lora_grpo.train.provenance import installed_versions

    gpu, cpuinfo = find_gpu(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "gpu": gpu.name if gpu else None,
        "versions": installed_versions(),
    }


def read_results(path: Path | None) -> dict[str, Any]:
    """Return the results so far, or the beginning of new ones.

    Raises:
        ValueError: the file holds something else, or figures of another machine or version.
    """
    machine = describe_machine()
    if path is None or not path.exists():
        return {"machine": machine, "runs": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["machine"] == machine:
            return found
        other = found["machine"]["processor"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} holds no results of this script: name another") from error
    raise ValueError(
        f"--json {path} was measured on another machine or with other versions ({other}): name "
        "another file"
    )


def measure(spec: Row, folder: Path) -> Row:
    """Do what a spec asks in a process of its own, and return what it measured.

    Raises:
        FailedError: it failed; the message holds the end of what it printed.
    """
    spec_path, result_path, adapter = (
        folder / name for name in ("spec.json", "result.json", "adapter")
    )
    worker = [sys.executable, "-m", "lora_grpo.dev.benchmark_worker"]
    if spec["case"]["kind"] == "merge" and not adapter.exists():
        run_alone([*worker, "adapter", spec["case"]["flags"][1], str(adapter)])
    write_json(spec_path, {**spec, "adapter": str(adapter)})
    run_alone([*worker, str(spec_path), str(result_path)])
    return json.loads(result_path.read_text(encoding="utf-8"))


def run_benchmark(config: BenchmarkConfig) -> None:
    """Measure what is not measured yet and print the tables.

    Raises:
        OSError, ValueError: bad input.
        FailedError: a run failed; those before it are in the results.
    """
    results, specs = read_results(config.json), list_specs(config)

    def find(spec: Row) -> Row | None:
        return next((row for row in results["runs"] if spec.items() <= row.items()), None)

    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as name:
        for number, spec in enumerate(specs, 1):
            if find(spec):
                continue
            label = f"{spec['case']['title']}, {spec['side']}, seed {spec['seed']}"
            print(f"[{number}/{len(specs)}] {label}", flush=True)
            try:
                results["runs"].append({**spec, **measure(spec, Path(name))})
            except FailedError as error:
                raise FailedError(f"{label}: {error}") from error
            if config.json:
                write_json(config.json, results)
    print(build_tables([find(spec) for spec in specs]))


def summarise_side(runs: list[Row]) -> Row:
    """Return the medians and the spread of one side's repetitions of a case.

    The unit is a step, except for `learning`, which counts the seconds of all steps of a run.
    """
    learning = runs[0]["case"]["kind"] == "learning"
    steps = [row for run in runs for row in run["rows"]]
    seconds = [row["seconds"] for row in steps]
    if learning:
        seconds = [sum(row["seconds"] for row in run["rows"]) for run in runs]
    found = {
        "seconds": statistics.median(seconds),
        "spread": f"{show(min(seconds))} to {show(max(seconds))}, n {len(seconds)}",
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
    }
    if learning:
        found["spread"] += f"; {', '.join(str(len(run['rows'])) for run in runs)} steps"
    elif "generate" in steps[0]:
        found |= {name: statistics.median(row[name] for row in steps) for name in PHASES}
        speeds = [row["tokens"] / row["seconds"] for row in steps]
        found["tokens_per_second"] = statistics.median(speeds)
    return found


def show(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def build_tables(runs: list[Row]) -> str:
    """Return the table of times and the table of ratios, as Markdown, in the runs' order."""
    by_title: dict[str, dict[str, list[Row]]] = {}
    for run in runs:
        by_title.setdefault(run["case"]["title"], {}).setdefault(run["side"], []).append(run)
    times = [["case", "side", "seconds, median (least to most)"]]
    times[0] += [*(f"{name}, s" for name in PHASES), "tokens/s", "peak, GB"]
    ratios = [["case", "ratio of", "this project / other", "at most", ""]]
    for title, sides in by_title.items():
        case = sides[PROJECT][0]["case"]
        found = {side: summarise_side(sides[side]) for side in Case(**case).sides}
        for side, row in found.items():
            phases = [show(row[name]) if name in row else "" for name in PHASES]
            speed = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""
            median = f"{show(row['seconds'])} ({row['spread']})"
            times.append([title, side, median, *phases, speed, f"{row['peak_bytes'] / 1e9:.2f}"])
        mine, theirs = found[PROJECT], found[PEFT if case["kind"] == "merge" else TRL]
        for key, word in (("seconds", "time"), ("peak_bytes", "peak memory")):
            ratio, target = mine[key] / theirs[key], case["targets"].get(key)
            met = "" if target is None else "met" if round(ratio, 2) <= target else "missed"
            aimed = "" if target is None else f"{target:g}"
            ratios.append([title, word, f"{ratio:.2f}", aimed, met])
    return f"{write_table(times)}\n\n{write_table(ratios)}"


def write_table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first two columns are text."""
    marks = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))
