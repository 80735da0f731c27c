"""This project and plain TRL on the same work, in turns, each in a process of its own.

Every finished run is in the results file before the next one begins, so that a benchmark that was
stopped continues where it was. Nothing heavy is imported here.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from lora_grpo.machine.files import write_json
from lora_grpo.machine.hardware import find_gpu, total_memory
from lora_grpo.machine.process import resident_peak, run_alone
from lora_grpo.machine.terminal import ROOT, FailedError

PROJECT, TRL = "this project", "plain TRL"
TENSORS, LOGITS, PEFT = "this project, --proof tensors", "this project, --proof logits", "PEFT"
PHASES = ("generate", "update")
Name = Literal["all", "embedded", "smollm2", "smollm2-half-dead", "qwen-update", "scaling", "merge"]
# Completions, tokens of the prompt, tokens of a completion: one of them doubles at a time.
SCALING = (
    *((4, 128, 64), (8, 128, 64), (16, 128, 64)),
    *((4, 256, 64), (4, 512, 64), (4, 128, 128), (4, 128, 256)),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Compare this project with plain TRL's GRPOTrainer: seconds per step by phase, peak memory.

    Without a hub give --smollm2, --qwen and --gsm8k as folders; embedded needs none of them.
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


@dataclass(frozen=True)
class Run:
    """What one process measures: one side of a comparison.

    `flags` are those of the training command. One group in `one_live_in` gets rewards that differ,
    by a reward made for it; None keeps the run's own rewards. With `lengths` (prompt, completion)
    both sides get the same random tokens instead of sampling, so that a step is the update alone.
    Runs of `merge` have a `model` instead.
    """

    title: str
    flags: list[str]
    model: str | None = None
    one_live_in: int | None = None
    lengths: list[int] | None = None
    side: str = ""
    seed: int = 0
    steps: int = 1
    warmup_steps: int = 0

    @property
    def sides(self) -> tuple[str, ...]:
        """Ours first, then what it is compared with."""
        return (TENSORS, LOGITS, PEFT) if self.model else (PROJECT, TRL)


def in_float32(model: str, prompts: int, generations: int, length: int) -> list[str]:
    """Return the flags of a run in float32, one group per micro-batch."""
    sizes = {
        "--max-completion-length": length,
        "--num-generations": generations,
        "--per-device-train-batch-size": generations,
        "--gradient-accumulation-steps": prompts,
    }
    numbers = [word for flag, size in sizes.items() for word in (flag, str(size))]
    return ["--no-load-in-4bit", "--model", model, *numbers]


def update_alone(title: str, model: str, generations: int, prompt: int, length: int) -> Run:
    """Return the case of one group, of which only the update is timed."""
    flags = [*in_float32(model, 1, generations, length), "--dataset", "arithmetic"]
    sizes = f"1 x ({prompt} + {generations} x {length})"
    return Run(title + sizes, flags, one_live_in=1, lengths=[prompt, length])


def find_cases(config: BenchmarkConfig) -> list[Run]:
    """Return the comparisons asked for, their side and seed still open."""
    on_gsm8k = [*in_float32(config.smollm2, 4, 8, 96), "--dataset", config.gsm8k]
    smollm2 = "SmolLM2-135M on GSM8K, 4 x 8 x 96"
    dead = f"{smollm2}, half of the groups dead"
    cases = {
        "embedded": [Run("embedded model, 16 x 8 x 64", ["--preset", "tiny"])],
        "smollm2": [Run(smollm2, on_gsm8k, one_live_in=1)],
        "smollm2-half-dead": [Run(dead, on_gsm8k, one_live_in=2)],
        "qwen-update": [update_alone("Qwen2.5-0.5B, update alone, ", config.qwen, 8, 256, 64)],
        "scaling": [update_alone("SmolLM2-135M, ", config.smollm2, *sizes) for sizes in SCALING],
        "merge": [Run("merging into Qwen2.5-0.5B", [], model=config.qwen)],
    }
    chosen = cases if "all" in config.cases else config.cases
    return [case for name in chosen for case in cases[name]]


def list_runs(config: BenchmarkConfig) -> list[Run]:
    """Return what each process measures, in the order of their turns: the sides swap places in
    every second round."""
    return [
        replace(case, side=side, seed=seed, steps=config.steps, warmup_steps=config.warmup_steps)
        for case in find_cases(config)
        for seed in range(config.rounds)
        for side in (case.sides if seed % 2 == 0 else reversed(case.sides))
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
        same = found["machine"] == machine
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} holds no results of this script: name another") from error
    if not same:
        raise ValueError(
            f"--json {path} was measured on another machine or with other versions: name another"
        )
    return found


def measure(run: Run, folder: Path) -> Row:
    """Do one run in a process of its own, and return what it measured.

    Raises:
        FailedError: it failed; the message holds the end of what it printed.
    """
    worker = [sys.executable, "-m", "lora_grpo.dev.benchmark_worker"]
    if run.model:
        return measure_merge(run, folder, worker)
    asked, result = folder / "run.json", folder / "result.json"
    write_json(asked, asdict(run))
    run_alone([*worker, str(asked), str(result)])
    return json.loads(result.read_text(encoding="utf-8"))


def measure_merge(run: Run, folder: Path, worker: list[str]) -> Row:
    """Merge by one side's command, imports and all; an adapter is made before the first."""
    adapter = folder / "adapter"
    if not adapter.exists():
        run_alone([*worker, "adapter", run.model, str(adapter)])
    with tempfile.TemporaryDirectory(dir=folder) as home:
        target = f"{home}/merged"
        command = [*worker, "merge", run.model, str(adapter), target]
        if run.side != PEFT:
            script = [sys.executable, str(ROOT / "scripts" / "merge_adapter.py"), str(adapter)]
            proof = run.side.split()[-2:]
            command = [*script, "--model", run.model, "--output-dir", target, *proof]
        started = time.perf_counter()
        used = run_alone(command)
        seconds = time.perf_counter() - started
    return {"rows": [{"seconds": seconds}], "peak_bytes": resident_peak(used)}


def run_benchmark(config: BenchmarkConfig) -> None:
    """Measure what is not measured yet and print the tables.

    Raises:
        OSError, ValueError: bad input.
        FailedError: a run failed; those before it are in the results.
    """
    results, runs = read_results(config.json), list_runs(config)
    rows = []
    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as name:
        for number, run in enumerate(runs, 1):
            asked = asdict(run)
            row = next((row for row in results["runs"] if asked.items() <= row.items()), None)
            if row is None:
                label = f"{run.title}, {run.side}, seed {run.seed}"
                print(f"[{number}/{len(runs)}] {label}", flush=True)
                try:
                    row = asked | measure(run, Path(name))
                except FailedError as error:
                    raise FailedError(f"{label}: {error}") from error
                results["runs"].append(row)
                if config.json:
                    write_json(config.json, results)
            rows.append(row)
    print(build_tables(rows))


def show(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def build_tables(runs: list[Row]) -> str:
    """Return the table of times and the table of ratios, as Markdown, in the runs' order.

    Figures are medians over the steps of all of a side's runs, and over the runs' peaks.
    """
    grouped: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        grouped[run["title"]][run["side"]].append(run)
    phases = [f"{name}, s" for name in PHASES]
    times = [["case", "side", "seconds, median (least to most)", *phases, "tokens/s", "peak, GB"]]
    ratios = [["case", "this project / other", "time", "peak memory"]]
    for title, sides in grouped.items():
        medians = []
        for side, repeated in sides.items():
            steps = [row for run in repeated for row in run["rows"]]
            seconds = [row["seconds"] for row in steps]
            medians.append((median(seconds), median(run["peak_bytes"] for run in repeated)))
            spread = f"{show(min(seconds))} to {show(max(seconds))}, n {len(seconds)}"
            cells = [f"{show(medians[-1][0])} ({spread})"]
            if "tokens" in steps[0]:
                cells += [show(median(row[phase] for row in steps)) for phase in PHASES]
                cells += [f"{median(row['tokens'] / row['seconds'] for row in steps):.0f}"]
            else:
                cells += [""] * 3
            times.append([title, side, *cells, f"{medians[-1][1] / 1e9:.2f}"])
        shares = [
            f"{mine / theirs:.2f}" for mine, theirs in zip(medians[0], medians[-1], strict=True)
        ]
        ratios.append([title, list(sides)[-1], *shares])
    return f"{write_table(times)}\n\n{write_table(ratios)}"


def write_table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first two columns are text."""
    marks = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))
