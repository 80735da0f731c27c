"""This project and plain TRL on the same work, in alternation, each alone in a process of its own.

Every finished run is in the results file before the next one begins, so that a benchmark that was
stopped goes on where it was.
"""

import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from lora_grpo.dev.benchmark_cases import NAMES, Case, find_cases
from lora_grpo.dev.benchmark_report import build_tables, draw, summarise
from lora_grpo.machine.files import write_json
from lora_grpo.machine.hardware import find_gpu, total_memory
from lora_grpo.machine.process import run_alone
from lora_grpo.machine.terminal import FailedError

LONGEST_LEARNING = 80  # steps


@dataclass(frozen=True)
class BenchmarkConfig:
    """Compare this project with plain TRL's GRPOTrainer: seconds a step by phase, peak memory.

    Without a hub give --smollm2, --qwen and --gsm8k as folders; embedded and learning need none.
    """

    cases: Positional[Annotated[tuple[NAMES, ...], arg(metavar="CASE")]] = ("embedded",)
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
    """Results so far and from now on; what is in it already is not measured again."""
    plot: Path | None = None
    """Picture to write (PNG)."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least {least}, got {getattr(self, name)}")
        for name in ("json", "plot"):
            path = getattr(self, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"--{name} {path}: there is no folder {path.parent}")
        for name in ("smollm2", "qwen"):
            folder = Path(getattr(self, name)).expanduser()
            if folder.is_dir() and not (folder / "config.json").is_file():
                raise ValueError(f"--{name} {folder} has no config.json: give a model's folder")


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    from lora_grpo.train.plan import installed_versions

    gpu = find_gpu()
    return {
        "processor": name_processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "gpu": gpu.name if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": installed_versions(),
    }


def name_processor() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


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
            f"--json {path} was measured on another machine or with other versions "
            f"({found['machine']['processor']}): name another file"
        )
    return found


def order_sides(case: Case, number: int) -> list[str]:
    """Return the sides in the order of their turns: turned round in every second round."""
    return list(case.sides if number % 2 == 0 else reversed(case.sides))


def key(spec: dict[str, Any]) -> str:
    """Return what a run is known by: what was asked for."""
    names = ("case", "side", "seed", "steps", "warmup_steps")
    return json.dumps([spec[name] for name in names], sort_keys=True)


def list_specs(config: BenchmarkConfig, cases: list[Case]) -> list[dict[str, Any]]:
    """Return every run that is wanted, in the order of their turns."""
    return [
        {
            "case": json.loads(json.dumps(case.record())),
            "side": side,
            "seed": number,
            "steps": config.steps,
            "warmup_steps": config.warmup_steps,
            "max_steps": LONGEST_LEARNING,
        }
        for case in cases
        for number in range(config.rounds)
        for side in order_sides(case, number)
    ]


def measure(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make one run and return what it measured.

    Raises:
        FailedError: it failed; the message holds the end of what it printed.
    """
    spec_path, result_path = folder / "spec.json", folder / "result.json"
    work = [
        sys.executable,
        "-m",
        "lora_grpo.dev.benchmark_worker",
        str(spec_path),
        str(result_path),
    ]
    spec = {**spec, "folder": str(folder), "adapter": str(folder / "adapter")}
    if spec["case"]["kind"] == "merge" and not (folder / "adapter").exists():
        write_json(spec_path, {**spec, "make_adapter": spec["case"]["flags"][1]})
        run_alone(work)
    write_json(spec_path, spec)
    run_alone(work)
    return json.loads(result_path.read_text(encoding="utf-8"))


def run(config: BenchmarkConfig) -> None:
    """Measure what is not measured yet and print the tables.

    Raises:
        OSError, ValueError: bad input.
        FailedError: a run failed; those before it are in the results.
    """
    results = read_results(config.json)
    specs = list_specs(config, find_cases(config.cases, config.smollm2, config.qwen, config.gsm8k))
    done = {key(row) for row in results["runs"]}
    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as name:
        for number, spec in enumerate(specs, 1):
            if key(spec) in done:
                continue
            label = f"{spec['case']['name']}, {spec['side']}, seed {spec['seed']}"
            print(f"[{number}/{len(specs)}] {label}", flush=True)
            try:
                found = measure(spec, Path(name))
            except FailedError as error:
                raise FailedError(f"{label}: {error}") from error
            results["runs"].append({**spec, **found})
            if config.json:
                write_json(config.json, results)
    wanted = {key(spec) for spec in specs}
    cases = summarise([row for row in results["runs"] if key(row) in wanted])
    print(build_tables(cases))
    if config.plot:
        draw(cases, config.plot)
