"""Sabotaged and healthy runs of the embedded model, and what the diagnosis says of each.

    python -m lora_grpo.dev.sabotage --output-dir /tmp/sabotage

Each sabotage does on purpose what a rule of `diagnosis/rules.py` is to name. Prints the
table of docs/diagnosis.md; a run that is there already is not run again. Exit status: 0 each was
named first by its own rule and no healthy run raised anything, 1 otherwise.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_grpo.data.problems import load_problems
from lora_grpo.diagnosis.history import read_history
from lora_grpo.diagnosis.rules import diagnose
from lora_grpo.machine.files import write_jsonl
from lora_grpo.tasks.task import NUMBER_TASK

COMMAND = "import sys; from lora_grpo.cli import run; sys.exit(run(sys.argv.pop(1)))"
REWARDS = '''
import random
import re

kept = []

def constant(completions, **columns):
    return [1.0] * len(completions)

def nothing(completions, **columns):
    return [None] * len(completions)

def longer(completions, **columns):
    return [len(text) / 100 for text in completions]

def shorter(completions, **columns):
    return [-len(text) / 100 for text in completions]

def without_tags(completions, **columns):
    return [len(text) / 100 if "<" not in text else 0.0 for text in completions]

def wrong(completions, answer, **columns):
    """Pays for the tags around anything except the right answer."""
    inside = [re.search(r"<answer>\\s*(.*?)\\s*</answer>", text, re.S) for text in completions]
    return [1.5 * bool(found and found[1] != gold) for found, gold in zip(inside, answer)]

def loud(completions, **columns):
    """Fifty times as loud as the right answer, and of no use."""
    return [50.0 * (sum(map(ord, text)) % 7) for text in completions]

def noise(completions, **columns):
    return [random.random() for _ in completions]

def digits(completions, **columns):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]

def hoarding(completions, **columns):
    """Keeps 30 MB of each call."""
    kept.append(bytearray(b"x" * (30 << 20)))
    return [0.0] * len(completions)
'''
# Steps of the healthy runs whose merged models other runs begin with.
LEARNT = {"half-way": 6, "learnt": 40}
# Rules that no run here names first, and why.
UNSHOWN = {
    "not_finite": "the trainer stops before it records such a step",
    "gradient_zero": "all completions are masked, and so truncated, which is named before it",
    "entropy_collapse": "in these runs a tenth of the entropy is left; SmolLM2 shows it (docs)",
    "slow_generation": "the update of so small a model takes 40 % of a step on a CPU",
    "sampler_differs": "needs an engine of its own, vLLM",
}
# Problems that no model of this size solves.
FACTORS = [(7919 * at + 13, 104729 * at + 7) for at in range(1, 257)]
HARD = [{"question": f"What is {a} times {b}?", "answer": str(a * b)} for a, b in FACTORS]


@dataclass(frozen=True)
class SabotageConfig:
    """Run each sabotage and some healthy runs, and diagnose them."""

    output_dir: Path
    """Where the runs are written."""
    only: tuple[str, ...] = ()
    """Names of the runs; by default all."""
    max_steps: int = 15
    """Steps of a sabotaged run; a healthy one makes those of the preset."""
    healthy: int = 8
    """Healthy runs, of seeds 0, 1, ..."""


Flags = Sequence[object]


def sabotages(folder: Path) -> dict[str, tuple[str, Flags]]:
    """Return the name of each run, the rule that is to name it, and its flags."""
    rewards = folder / "rewards.py"
    alone = ("--reward-set", "none", "--reward")
    some, learnt = (("--model", folder / name) for name in LEARNT)
    hard = ("--dataset", folder / "hard.jsonl")
    cold, long = ("--temperature", 0.05), ("--max-steps", 30)
    return {
        "learning rate 1": ("learning_rate_high", ("--learning-rate", 1)),
        "learning rate 1e-9": ("learning_rate_low", ("--learning-rate", 1e-9)),
        "limit of 8 tokens": ("truncated", ("--max-completion-length", 8)),
        "constant reward": ("constant_reward", (*alone, f"{rewards}:constant")),
        "reward of None": ("no_reward", (*alone, f"{rewards}:nothing")),
        "reward for text without tags": ("reward_hacking", (*alone, f"{rewards}:without_tags")),
        "reward for wrong answers": ("reward_hacking", (*alone, f"{rewards}:wrong")),
        # On easy problems it would teach the reasoning, which is longer than none.
        "reward for length, on problems out of reach": (
            "length_runaway",
            (*alone, f"{rewards}:longer", *hard, "--max-completion-length", 128, *long),
        ),
        "reward for shortness": ("length_collapse", (*alone, f"{rewards}:shorter", *long)),
        "reward for digits, far from the reference": (
            "kl_high",
            (*alone, f"{rewards}:digits", "--beta", 1e-6, "--learning-rate", 5e-3),
        ),
        "reward of noise, on a model that has learnt": (
            "validation_falls",
            (*alone, f"{rewards}:noise", *learnt, "--learning-rate", 2e-3),
        ),
        "a reward fifty times as loud": ("drowned_reward", ("--reward", f"{rewards}:loud")),
        "a reward that keeps memory": (
            "memory_creeps",
            ("--reward", f"{rewards}:hoarding", "--max-steps", 24),
        ),
        "wrong gold answers": ("wrong_gold", ("--dataset", folder / "wrong.jsonl")),
        "a system prompt that forbids the tags": (
            "no_format",
            ("--system-prompt-file", folder / "prompt.txt"),
        ),
        "problems out of reach, on a model that has learnt": (
            "too_hard",
            (*learnt, *hard, "--reward-weight", "format=0"),
        ),
        "a model that has learnt, sampled cold": ("too_easy", (*learnt, *cold)),
        "a model half-way, sampled cold": ("few_live_groups", (*some, *cold)),
        "gradients clipped at 0.001": ("gradient_clipped", ("--max-grad-norm", 0.001)),
        "two small steps": ("within_noise", ("--max-steps", 2, "--learning-rate", 1e-4)),
    }


def write_inputs(folder: Path) -> None:
    """Write the reward file, the prompt, and the problems with wrong and with hard answers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompt.txt").write_text(
        f"Say the number only, without {' '.join(NUMBER_TASK.tags)}."
    )
    problems = load_problems("arithmetic")[:512]
    rows = [{"question": one.question, "answer": str(int(one.answer) + 13)} for one in problems]
    write_jsonl(folder / "wrong.jsonl", rows)
    write_jsonl(folder / "hard.jsonl", HARD)


def start(command: str, *words: object) -> None:
    line = [sys.executable, "-c", COMMAND, command, *map(str, words)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def train(folder: Path, name: str, flags: Flags) -> Path:
    """Make a run, unless it is there, and return its directory."""
    run = folder / name.replace(" ", "-").replace(",", "")
    if not (run / "eval.json").is_file():
        settings = ("--preset", "tiny", "--adapters-dir", folder, "--run-name", run.name)
        settings += ("--eval-steps", 5, "--log-completions-steps", 5, "--quiet")
        settings += ("--num-eval-items", 128, "--num-validation-items", 64)
        start("train", *settings, *flags)
    return run


def learn(folder: Path) -> None:
    """Make the models that some sabotages begin with, of a short and of a whole healthy run."""
    for name, steps in LEARNT.items():
        if not (folder / name).is_dir():
            run = train(folder, f"{name} adapter", ("--max-steps", steps))
            start("merge", run, "--output-dir", folder / name)


def main() -> int:
    """Run everything and print the table."""
    config = tyro.cli(SabotageConfig, description=__doc__)
    folder = config.output_dir
    write_inputs(folder)
    learn(folder)
    runs = {
        name: (rule, ("--max-steps", config.max_steps, *flags))
        for name, (rule, flags) in sabotages(folder).items()
    }
    runs |= {f"healthy, seed {seed}": ("", ("--seed", seed)) for seed in range(config.healthy)}
    failed = 0
    print("| run | its rule | named first | since step | beside it |")
    print("| --- | --- | --- | ---: | --- |")
    for name, (rule, flags) in runs.items():
        if config.only and name not in config.only:
            continue
        found = diagnose(read_history(train(folder, name, flags)))
        first = found[0].rule if found else ""
        since = found[0].since if found else ""
        beside = ", ".join(finding.rule for finding in found[1:])
        print(f"| {name} | {rule} | {first} | {since} | {beside} |", flush=True)
        failed += first != rule
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
