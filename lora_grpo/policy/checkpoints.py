"""The checkpoints of a run: written atomically, rotated, and checked before a resume."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from lora_grpo.machine.files import STAGED, read_json, read_jsonl
from lora_grpo.policy.adapter import CONFIG, LOGS, WEIGHTS, check_whole, name_embedded_base

KEPT_CHECKPOINTS = 2
BEST = "best_adapter.safetensors"  # in a checkpoint: the adapter of the best step up to it
IN_A_CHECKPOINT = (
    *(CONFIG, WEIGHTS, "trainer_state.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name, or None for a folder of another name."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, the oldest first."""
    found = (path for path in run_dir.glob("checkpoint-*") if step_of(path) is not None)
    return sorted(found, key=step_of)


def rotate_checkpoints(run_dir: Path) -> None:
    """Keep only the newest checkpoints. Older ones are renamed first, so that a half-removed folder
    is never taken for a checkpoint."""
    for old in list_checkpoints(run_dir)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old.rename(run_dir / f"{STAGED}old-{old.name}"))


@contextmanager
def whole_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """Yield a folder for transformers' trainer to write the checkpoint of a step into; add the best
    adapter so far and move it to its place if the block ends without an error."""
    staged, name = run_dir / f"{STAGED}checkpoint-{step}", f"checkpoint-{step}"
    try:
        yield staged
        name_embedded_base(staged / name)
        # A frozen reference, which the run's `start` holds already.
        shutil.rmtree(staged / name / "ref", ignore_errors=True)
        if (run_dir / WEIGHTS).is_file():
            shutil.copyfile(run_dir / WEIGHTS, staged / name / BEST)
        shutil.rmtree(run_dir / name, ignore_errors=True)
        (staged / name).rename(run_dir / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    rotate_checkpoints(run_dir)


class WholeCheckpoints:
    """Lets a trainer of transformers write each checkpoint whole or not at all."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = self.args.output_dir
        with whole_checkpoint(Path(run_dir), self.state.global_step) as staged:
            self.args.output_dir = str(staged)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = run_dir


def check_run(run_dir: Path) -> None:
    """Check the files that a resume needs; the trainer would ignore some that are missing.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken; the message names it.
    """
    steps = [len(read_jsonl(run_dir / name)) for name in LOGS]
    found = list_checkpoints(run_dir)
    if not found:
        return
    *older, newest = found
    instead = f"remove {newest} to resume from {older[-1]}" if older else "start anew"
    if not steps[0]:
        raise FileNotFoundError(
            f"--resume {run_dir}: {run_dir / LOGS[0]} holds no step, but {newest.name} does: put "
            "the file back, or start anew"
        )
    for name in IN_A_CHECKPOINT:
        if not (newest / name).is_file():
            raise FileNotFoundError(f"--resume {run_dir}: {newest / name} is missing: {instead}")
    try:
        read_json(newest / "trainer_state.json")
        for weights in newest.glob("*.safetensors"):
            check_whole(weights)
    except ValueError as error:
        raise ValueError(f"--resume {run_dir}: {error}, or {instead}") from error
    for path in [*newest.glob("*.pt"), *newest.glob("*.pth")]:
        if not is_zipfile(path):  # torch's format
            raise ValueError(f"--resume {run_dir}: {path} was cut short: {instead}")
