"""The adapter that is kept is of the step that it names, whatever happened on the way."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainers import make_trainer
from transformers import set_seed

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.policy.adapter import WEIGHTS, read_step
from lora_grpo.policy.checkpoints import list_checkpoints
from lora_grpo.train.console import Display
from lora_grpo.train.recorder import (
    Recorder,
    best_step,
    clear_leftovers,
    return_to_checkpoint,
)

EVERY = 2  # steps from one validation, and one checkpoint, to the next


class Killed(BaseException):
    """Raised where a kill would come."""


def result(accuracy: float) -> dict[str, Any]:
    return {"num_items": 8, "strict_accuracy": accuracy, "format_rate": 1.0, "ci95": [0.0, 1.0]}


def train(run_dir: Path, seed: int, accuracies: list[float], kill_after: int | None = None) -> None:
    """Make the steps that are still to be made; validations come out as they are told."""
    settings = {
        "max_steps": 6,
        "save_steps": EVERY,
        "eval_steps": EVERY,
        "max_completion_length": 12,
    }
    trainer = make_trainer(run_dir, **settings)
    told = iter(accuracies)

    class Killing(Display):
        def validation(self, row: dict[str, Any], kept: bool) -> None:
            if row["step"] == kill_after:
                raise Killed

    config, display = TrainConfig(num_generations=4, **settings), Killing(quiet=True)
    recorder = Recorder(trainer, config, run_dir, display, lambda: result(next(told)))
    trainer.add_callback(recorder)
    checkpoint = return_to_checkpoint(run_dir)
    if checkpoint:
        (checkpoint / "rng_state.pth").unlink()  # as on a GPU: what is sampled is not the same
    set_seed(seed)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def same(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("again", "best"), [([0.1, 0.2], 2), ([0.5, 0.5], 6)], ids=str)
def test_a_resume_that_does_not_repeat_keeps_weights_and_name_together(
    tmp_path: Path, again: list[float], best: int
) -> None:
    """Killed when step 4 has just been kept, before its checkpoint: step 2 must come back."""
    run, saved = tmp_path / "run", tmp_path / "saved"
    run.mkdir()
    with pytest.raises(Killed):
        train(run, seed=1, accuracies=[0.5, 0.8], kill_after=4)
    assert read_step(run / WEIGHTS) == 4 and len(list_checkpoints(run)) == 1
    shutil.copytree(run / "checkpoint-2", saved / "checkpoint-2")
    shutil.copyfile(run / WEIGHTS, saved / WEIGHTS)
    train(run, seed=2, accuracies=again)
    assert best_step(run) == read_step(run / WEIGHTS) == best
    made = saved if best == 2 else run
    assert same(run / WEIGHTS, made / f"checkpoint-{best}" / WEIGHTS)
    assert not same(run / WEIGHTS, saved / WEIGHTS), "the steps were not repeated bit for bit"


def test_only_names_of_this_project_are_cleared(tmp_path: Path) -> None:
    own = (".staged-metrics.jsonl.ab", ".staged-checkpoint-8/model", "last/.staged-adapter.x/w")
    others = (".git/HEAD", ".gitignore", ".base_items.jsonl", ".cache/x", "checkpoint-mine/notes")
    for name in (*own, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    clear_leftovers(tmp_path)
    assert [name for name in own if (tmp_path / name).exists()] == []
    assert [name for name in others if not (tmp_path / name).exists()] == []
