"""What kind of folder a script was given, and the command that takes it instead.

Nothing is loaded; a folder is known by the files that this project and PEFT write.
"""

from pathlib import Path

from lora_grpo.machine.files import read_json
from lora_grpo.machine.terminal import command_line

RUN_FILE, ADAPTER_FILE, MODEL_FILE = "train_config.json", "adapter_config.json", "config.json"
CHECKPOINT_FILE, MERGED_FILE, EXPORT_FILE = (
    "trainer_state.json",
    "merge_report.json",
    "export_report.json",
)
KINDS = {
    "checkpoint": "a checkpoint for --resume of the run {run}",
    "last": "the last step's adapter of the run {run}",
    "merged": "a merged model, made from {run}",
    "export": "an export, made from {run}",
    "run": "the folder of a run",
    "adapter": "an adapter that train_lora.py did not write",
    "model": "a whole model",
    "other": "neither an adapter nor a model",
}


def kind_of(folder: Path) -> str:
    """Return which of `KINDS` a folder is."""
    in_a_run = any((folder.parent / name).is_file() for name in (RUN_FILE, ADAPTER_FILE))
    if (folder / CHECKPOINT_FILE).is_file() or (in_a_run and folder.name[:11] == "checkpoint-"):
        return "checkpoint"
    if folder.name == "last" and (folder.parent / RUN_FILE).is_file():
        return "last"
    for name, kind in ((MERGED_FILE, "merged"), (EXPORT_FILE, "export"), (MODEL_FILE, "model")):
        if (folder / name).is_file():
            return kind
    if (folder / RUN_FILE).is_file():
        return "run"
    return "adapter" if (folder / ADAPTER_FILE).is_file() else "other"


def run_of(folder: Path) -> Path:
    """Return the run that a folder belongs to or was made from; where that is unknown, the folder
    itself."""
    kind = kind_of(folder)
    if kind in ("checkpoint", "last"):
        return folder.parent
    report = {"merged": (MERGED_FILE, "adapter"), "export": (EXPORT_FILE, "source")}.get(kind)
    if report is None:
        return folder
    try:
        name = read_json(folder / report[0])[report[1]]
    except (OSError, ValueError, KeyError):
        name = folder.name
    return Path("adapters") / str(name)


def check_kind(folder: Path, script: str, wanted: str, kinds: tuple[str, ...]) -> None:
    """Refuse a folder that a script does not take.

    Raises:
        ValueError: it is of none of these kinds; the message gives the command that works.
    """
    kind = kind_of(folder)
    if kind in kinds:
        return
    found = KINDS[kind].format(run=run_of(folder))
    hint = what_works(folder, kind, script, kinds)
    raise ValueError(f"{folder} is {found}; {script} takes {wanted}: {hint}")


def what_works(folder: Path, kind: str, script: str, kinds: tuple[str, ...]) -> str:
    """Return the command that does what was most likely meant."""
    run = run_of(folder)
    if script in ("evaluate.py", "merge_adapter.py") and kind in ("merged", "model"):
        return command_line("evaluate.py", "--model", folder)
    if kind in ("other", "adapter", "model") and kind not in kinds:
        return "give one that train_lora.py wrote, such as adapters/tiny"
    if script == "train_lora.py":
        return command_line(script, "--resume", run)
    more = ("--repo", "you/name") if script == "push_to_hub.py" else ()
    return command_line(script, run, *more, *(("--merged",) if more and kind == "merged" else ()))
