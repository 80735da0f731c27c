"""Sabotaged and healthy runs of the embedded model, and what the diagnosis says of each.

    python -m lora_grpo.dev.sabotage --output-dir /tmp/sabotage

Each sabotage does on purpose what a rule of `diagnosis/rules.py` is to name. Prints the
table of docs/diagnosis.md; a run that is there already is not run again. Exit status: 0 each was
named first by its own rule and no healthy run raised anything, 1 otherwise.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_grpo.data.problems import load_problems
from lora_grpo.diagnosis.history import read_history
from lora_grpo.diagnosis.rules import diagnose

TRAIN = "import sys; from lora_grpo.cli import run; sys.exit(run('train'))"
REWARDS = '''
import re

def constant(completions, **columns):
    return [1.0] * len(completions)

def longer(completions, **columns):
    return [len(text) / 100 if "<" not in text else 0.0 for text in completions]

def wrong(completions, answer, **columns):
    """Pays for the tags around anything except the right answer."""
    inside = [re.search(r"<answer>\\s*(.*?)\\s*</answer>", text, re.S) for text in completions]
    return [1.5 * bool(found and found[1] != gold) for found, gold in zip(inside, answer)]

def loud(completions, **columns):
    """Fifty times as loud as the right answer, and of no use."""
    return [50.0 * (sum(map(ord, text)) % 7) for text in completions]
'''


@dataclass(frozen=True)
class SabotageConfig:
    """Run each sabotage and some healthy runs, and diagnose them."""

    output_dir: Path
    """Where the runs are written."""
    only: tuple[str, ...] = ()
    """Names of the runs; by default all."""
    max_steps: int = 15
    """Steps of a run."""
    healthy: int = 3
    """Healthy runs, of seeds 0, 1, ..."""


def sabotages(folder: Path) -> dict[str, tuple[str, Sequence[object]]]:
    """Return the name of each run, the rule that is to name it, and its flags."""
    rewards = folder / "rewards.py"
    alone = ("--reward-set", "none", "--reward")
    return {
        "learning rate 1": ("learning_rate_high", ("--learning-rate", 1)),
        "learning rate 1e-9": ("learning_rate_low", ("--learning-rate", 1e-9)),
        "limit of 8 tokens": ("truncated", ("--max-completion-length", 8)),
        "constant reward": ("constant_reward", (*alone, f"{rewards}:constant")),
        "reward for text without tags": ("reward_hacking", (*alone, f"{rewards}:longer")),
        "reward for wrong answers": ("reward_hacking", (*alone, f"{rewards}:wrong")),
        "a reward fifty times as loud": ("drowned_reward", ("--reward", f"{rewards}:loud")),
        "wrong gold answers": ("wrong_gold", ("--dataset", folder / "wrong.jsonl")),
        "gradients clipped at 0.001": ("gradient_clipped", ("--max-grad-norm", 0.001)),
    }


def write_inputs(folder: Path) -> None:
    """Write the reward file and the problems with wrong gold answers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    problems = load_problems("arithmetic")[:512]
    rows = [{"question": one.question, "answer": str(int(one.answer) + 13)} for one in problems]
    (folder / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, name: str, max_steps: int, flags: Sequence[object]) -> Path:
    run = folder / name.replace(" ", "-")
    if not (run / "eval.json").is_file():
        command = ("--preset", "tiny", "--adapters-dir", folder, "--run-name", run.name)
        command += ("--max-steps", max_steps, "--eval-steps", 5, "--log-completions-steps", 5)
        command += ("--num-eval-items", 128, "--num-validation-items", 64, "--quiet")
        words = [sys.executable, "-c", TRAIN, *map(str, (*command, *flags))]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return run


def main() -> int:
    """Run everything and print the table."""
    config = tyro.cli(SabotageConfig, description=__doc__)
    write_inputs(config.output_dir)
    runs = sabotages(config.output_dir)
    runs |= {f"healthy, seed {seed}": ("", ("--seed", seed)) for seed in range(config.healthy)}
    failed = 0
    print("| run | its rule | named first | since step | beside it |")
    print("| --- | --- | --- | ---: | --- |")
    for name, (rule, flags) in runs.items():
        if config.only and name not in config.only:
            continue
        found = diagnose(read_history(train(config.output_dir, name, config.max_steps, flags)))
        first = found[0].rule if found else ""
        since = found[0].since if found else ""
        beside = ", ".join(finding.rule for finding in found[1:])
        print(f"| {name} | {rule} | {first} | {since} | {beside} |", flush=True)
        failed += first != rule
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
