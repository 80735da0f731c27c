"""`diagnose`: a run's directory or another trainer's log goes in, one line per fault comes out."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from lora_grpo.diagnosis.history import WINDOW, read_history
from lora_grpo.diagnosis.rules import Finding, diagnose


@dataclass(frozen=True)
class DiagnoseConfig:
    """Say what is wrong with a run, since which step, why, and which setting to change."""

    run: tyro.conf.Positional[Path]
    """An adapter directory, or what another TRL trainer left: trainer_state.json, log_history."""
    json: bool = False
    """Print one JSON object."""


def run(config: DiagnoseConfig) -> None:
    """Print what is wrong with a run.

    Raises:
        FileNotFoundError, ValueError: see `read_history`.
    """
    if not config.run.exists():
        raise FileNotFoundError(f"there is no {config.run}: name an adapter directory or a log")
    history = read_history(config.run)
    findings = diagnose(history)
    if config.json:
        print(json.dumps({"steps": len(history.steps), "findings": [*map(asdict, findings)]}))
    else:
        print(describe(len(history.steps), findings))


def describe(steps: int, findings: list[Finding]) -> str:
    """Return one line per finding, or one line that says that there is none."""
    if findings:
        return "\n".join(map(str, findings))
    few = f"; most faults show after {2 * WINDOW} steps" if steps < 2 * WINDOW else ""
    return f"nothing wrong in {steps} steps{few}"
