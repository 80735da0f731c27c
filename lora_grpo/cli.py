"""The commands, started as `lora-grpo COMMAND` or by the script of a checkout: each parses its
flags, makes one library call, and prints where the result is and which command comes next.

The heavy imports are inside the functions, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TypeVar

from lora_grpo.machine.terminal import BAD_INPUT, COMMAND, command_line, run_command

Config = TypeVar("Config")


def parse(kind: type[Config], command: Callable[[], int | None]) -> Config:
    """Return the configuration that the flags give; the command's docstring is its help."""
    import tyro

    return tyro.cli(kind, description=inspect.getdoc(command))


def train() -> int:
    """Train a LoRA adapter with GRPO, evaluate it against its base, save it in adapters/<run>.

    Exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted and ready to be resumed.
    """
    from lora_grpo.config.presets import parse_train_config

    config, why = parse_train_config()
    from lora_grpo.train.command import run as run_training

    return run_training(config, why)


def evaluate() -> None:
    """Evaluate an adapter against its base, or a model alone, on held-out problems, greedily.

    For an adapter directory that `train` wrote, the figures equal those of its eval.json. Exit
    status: 0 evaluated, 2 bad input.
    """
    from lora_grpo.results.evaluate import EvaluateConfig
    from lora_grpo.results.evaluate import evaluate as evaluate_models
    from lora_grpo.train.console import Display

    config, display = parse(EvaluateConfig, evaluate), Display()
    report = evaluate_models(config, display.bar)
    for note in report.get("notes", ()):
        display.say(note)
    display.results(report)
    if config.output:
        display.say(f"written: {config.output}")


def report() -> None:
    """Write report.html of a run, or of several side by side: verdict, curves and completions.

    One file that needs no network, in the run's directory unless --output says otherwise; also for
    a run that has not ended. Exit status: 0 written, 2 bad input.
    """
    from lora_grpo.report.command import ReportConfig, write

    print(f"report: {write(parse(ReportConfig, report))}")


def diagnose() -> None:
    """Say what is wrong with a run, since which step, why, and which setting to change.

    Reads a run of this project, also while it goes on, or the log of any TRL trainer. Exit status:
    0 diagnosed, 2 bad input.
    """
    from lora_grpo.diagnosis.command import DiagnoseConfig
    from lora_grpo.diagnosis.command import run as run_diagnosis

    run_diagnosis(parse(DiagnoseConfig, diagnose))


def merge() -> None:
    """Merge a LoRA adapter into its base as a plain 16-bit model, proven to be the same policy.

    An adapter trained on a 4-bit base is merged into the original 16-bit weights. What the proof
    found is printed, and is in the folder's merge_report.json. Exit status: 0 merged and proven, 1
    the proof failed and nothing was kept, 2 the input cannot be merged.
    """
    from lora_grpo.merge.command import MergeConfig, merge_adapter

    result = merge_adapter(parse(MergeConfig, merge))
    print(result.table)
    print(f"merged model: {result.folder}")
    print(f"next: {command_line('evaluate.py', '--model', result.folder)}")


def export() -> None:
    """Export an adapter to the formats that people run, each proven to be the merged model.

    Prints a table of sizes and distances, and the command that runs each export. Exit status: 0
    exported and proven, 1 a proof failed and nothing was kept, 2 the input cannot be exported so.
    """
    from lora_grpo.export.command import export_model
    from lora_grpo.export.config import ExportConfig

    result = export_model(parse(ExportConfig, export))
    print(result.table)
    print(f"exported: {result.folder}")
    for command in result.commands:
        print(f"next: {command}")


def push() -> None:
    """Push an adapter to the Hugging Face Hub, and what is made of it; private unless asked.

    Log in first with `hf auth login`, or set HF_TOKEN. The Hub's listing is compared with what was
    sent; a second push of the same files changes nothing. Exit status: 0 all is there, 1 the Hub
    failed or does not hold what was sent, 2 bad input or a question answered with no.
    """
    from lora_grpo.deploy.hub import PushConfig, push_to_hub

    push_to_hub(parse(PushConfig, push))


def chat() -> None:
    """Ask an adapter or a merged model in the terminal, as it was asked in training.

    Each question is asked alone, with the training prompt and greedily. Without --ask questions
    come from the terminal, or from a pipe, one per line. Exit status: 0 answered, 2 bad input, 130
    interrupted.
    """
    from lora_grpo.deploy.chat import ChatConfig
    from lora_grpo.deploy.chat import chat as start_chat

    start_chat(parse(ChatConfig, chat))


def serve() -> int:
    """Serve an adapter with its base, or a merged model, over the OpenAI API.

    An adapter is served on the base's whole weights, also where it was trained on 4-bit ones.
    Prints the command that it runs and, once the server answers, a curl line that asks it a
    question. Exit status: 0 ended by Ctrl-C, 1 the server ended by itself, 2 it cannot be served.
    """
    from lora_grpo.deploy.serve import ServeConfig
    from lora_grpo.deploy.serve import serve as start_server

    return start_server(parse(ServeConfig, serve))


def doctor() -> int:
    """Check whether this machine can train and how it would; say what to type where it cannot.

    Looks at Python, the system, the GPU, the packages and the Hub, and tries the imports in
    processes of their own. Exit status: 0 when training can run, 1 when it cannot, 2 bad input.
    """
    from lora_grpo.doctor.command import DoctorConfig, examine, print_report, show_progress, to_json

    config = parse(DoctorConfig, doctor)
    with show_progress():
        report = examine(config)
    if config.json:
        print(to_json(report))
    else:
        print_report(report)
    return 0 if report.can_train else 1


def plan() -> int:
    """Predict the peak memory of a training run, and choose settings with which it fits.

    Exit status: 0 it fits, 1 nothing fits, 2 bad input.
    """
    from lora_grpo.memory.command import run as run_planning

    return run_planning(sys.argv[1:])


def check_rewards() -> int:
    """Check rewards before they train anything, without a model.

    Scores about 60 tricky completions: a correct, well-formed one must outrank every other. With
    --dataset each gold answer goes through the reward too. Exit status: 0 all is right, 1 a ranking
    or a gold answer is wrong, 2 bad input.
    """
    from lora_grpo.rewards.check import CheckRewardsConfig
    from lora_grpo.rewards.check import check_rewards as check

    return 0 if check(parse(CheckRewardsConfig, check_rewards)) else 1


FUNCTIONS = {
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "diagnose": diagnose,
    "merge": merge,
    "export": export,
    "push": push,
    "chat": chat,
    "serve": serve,
    "doctor": doctor,
    "plan": plan,
    "check-rewards": check_rewards,
}
INTERRUPTED = {
    "merge": "interrupted: nothing was written",
    "export": "interrupted: nothing was written",
    "push": "interrupted: run it again, what arrived is not sent twice",
}


def run(command: str) -> int:
    """Run a command on the flags in `sys.argv` and return its exit status."""
    return run_command(FUNCTIONS[command], INTERRUPTED.get(command, "interrupted"))


def describe_usage() -> str:
    """Return the list of commands with the first line of each one's help."""
    width = max(map(len, FUNCTIONS))
    lines = (
        f"  {name:{width}}  {function.__doc__.splitlines()[0]}"
        for name, function in FUNCTIONS.items()
    )
    return "\n".join(
        [f"usage: {COMMAND} COMMAND [flags]; {COMMAND} COMMAND --help lists them", "", *lines]
    )


def main() -> int:
    """Run `lora-grpo COMMAND ...` and return the exit status."""
    from lora_grpo import __version__

    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in FUNCTIONS:
        sys.argv[:2] = [f"{COMMAND} {first}"]  # how its help and its messages name it
        return run(first)
    if first in ("-h", "--help", "--version"):
        print(__version__ if first == "--version" else describe_usage())
        return 0
    print(f"error: {first} is not a command of {COMMAND}\n{describe_usage()}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
