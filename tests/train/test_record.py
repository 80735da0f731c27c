"""Whatever a step lacks, it is recorded and shown, and the run goes on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from trainers import SMALL, make_trainer
from transformers import TrainerControl, TrainerState

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.grpo.batch import Batch, had_signal
from lora_grpo.grpo.groups import dead_groups
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.machine.files import read_jsonl
from lora_grpo.rewards.builtin import Reward
from lora_grpo.tasks.task import NUMBER_TASK
from lora_grpo.train.console import Display
from lora_grpo.train.recorder import LOGGED, Recorder, describe_step

G = 4
MISSING = object()
ABSENT = {"missing": MISSING, "None": None, "nan": math.nan, "infinite": -math.inf}


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> LoraGRPOTrainer:
    """A trainer after one real step with a KL term, so that every figure of TRL's was logged."""
    trainer = make_trainer(tmp_path_factory.mktemp("stepped"), beta=0.1, max_completion_length=12)
    trainer.train()
    return trainer


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def log(
    trainer: LoraGRPOTrainer, folder: Path, logs: dict[str, Any], capsys
) -> tuple[dict[str, Any], str]:
    """Return the row that the recorder writes and the line that the console prints of it."""
    display = Display(console=Console(width=200, highlight=False))
    config = TrainConfig(num_generations=G, log_completions_steps=1)
    recorder = Recorder(trainer, config, folder, display)
    capsys.readouterr()
    state = TrainerState(global_step=1, max_steps=1)
    recorder.on_log(trainer.args, state, TrainerControl(), logs)
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=no_constant)
    assert row.pop("peak_memory_bytes") > 0
    return row, capsys.readouterr().out


def test_every_figure_of_trl_may_be_absent(
    stepped: LoraGRPOTrainer, tmp_path: Path, capsys
) -> None:
    logs = stepped.state.log_history[0]
    (tmp_path / "whole").mkdir()
    whole, shown = log(stepped, tmp_path / "whole", logs, capsys)
    assert all(isinstance(whole[name], float) for name in LOGGED), "each was there to be left out"
    for name in logs:
        for how, value in ABSENT.items():
            folder = tmp_path / f"{name.replace('/', '.')} {how}"
            folder.mkdir()
            changed = {key: found for key, found in logs.items() if key != name}
            changed |= {} if value is MISSING else {name: value}
            row, line = log(stepped, folder, changed, capsys)
            assert row == whole | ({name: None} if name in LOGGED else {}), folder.name
            assert line.partition(" s  ")[0] == shown.partition(" s  ")[0]


def crafted(rewards: list[float | None], completion: str = "") -> Batch:
    count = len(rewards)
    return Batch(
        ["What is 1 + 1?"] * count,
        ["2"] * count,
        [completion] * count,
        [1] * count,
        [False] * count,
        {"own": rewards},
        [NUMBER_TASK.judge(completion, "2")] * count,
    )


BATCHES: dict[str, tuple[Batch, dict[str, Any]]] = {
    "nothing was sampled": (
        Batch(),
        dict.fromkeys(("reward", "correct", "format", "clipped_ratio")),
    ),
    "no reward applied": (
        crafted([None] * 8),
        {"reward": None, "rewards": {"own": None}, "frac_reward_zero_std": 1.0, "correct": 0.0},
    ),
    "a reward applied to one of each group": (
        crafted([None, 3.0, None, None] * 2),
        {"reward": 3.0, "frac_reward_zero_std": 1.0},
    ),
    "the group that no reward applied to is dead": (
        crafted([None] * 4 + [None, 0.0, 1.0, 1.0]),
        {"reward": 2 / 3, "frac_reward_zero_std": 0.5},
    ),
    "all right": (
        crafted([1.0] * 8, "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n2\n</answer>"),
        {"reward": 1.0, "correct": 1.0, "format": 1.0, "frac_reward_zero_std": 1.0},
    ),
    "all empty": (crafted([0.0] * 8), {"correct": 0.0, "format": 0.0, "completion_length": 1.0}),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_every_shape_of_batch(
    stepped: LoraGRPOTrainer, tmp_path: Path, capsys, monkeypatch, name: str, seconds: float
) -> None:
    batch, expected = BATCHES[name]
    monkeypatch.setattr(stepped.step, "batch", batch)
    monkeypatch.setattr(stepped.step, "seconds", dict.fromkeys(stepped.step.seconds, seconds))
    row, line = log(stepped, tmp_path, {"loss": 0.0}, capsys)
    assert expected.items() <= row.items()
    speeds = [row["tokens_per_second_generate"], row["tokens_per_second_update"]]
    assert speeds == ([float(sum(batch.tokens))] * 2 if seconds else [None] * 2)
    shown = line.splitlines()[0]
    assert ("reward " in shown) == (row["reward"] is not None)
    assert ("tokens/s" in shown) == (seconds > 0)


def test_a_group_is_dead_by_the_rewards_that_applied() -> None:
    totals = [None, None, 1.0, 1.0, 2.0, None, 2.5, 2.0]
    assert dead_groups(totals, 2) == [True, True, True, False]


def test_a_fault_is_said_once_while_it_lasts(
    stepped: LoraGRPOTrainer, tmp_path: Path, capsys, monkeypatch
) -> None:
    """After five steps in which every completion earned the same, with the setting to change."""
    config = TrainConfig(num_generations=G, log_completions_steps=100)
    recorder = Recorder(stepped, config, tmp_path, Display(quiet=True))
    monkeypatch.setattr(stepped.step, "batch", crafted([0.5] * 8))
    said = []
    for step in range(1, 20):
        state = TrainerState(global_step=step, max_steps=20)
        recorder.on_log(stepped.args, state, TrainerControl(), {"grad_norm": 0.0})
        said.append(capsys.readouterr().out)
    assert [step for step, text in enumerate(said, 1) if text] == [5]
    assert "since step 1" in said[4] and "--" in said[4]


def test_a_gradient_of_zero_is_no_signal_either() -> None:
    row = describe_step(crafted([0.0, 1.0] * 4), G, {"grad_norm": 0.5})
    assert had_signal(row) and had_signal(row | {"grad_norm": None})
    assert not had_signal(row | {"grad_norm": 0.0})
    assert not had_signal(row | {"frac_reward_zero_std": 1.0})


def constant(completions: list, **columns: Any) -> list[float]:
    return [0.1] * len(completions)  # the mean of eight of these is not 0.1 in float32


def nothing(completions: list, **columns: Any) -> list[None]:
    return [None] * len(completions)


def by_length(completions: list, **columns: Any) -> list[float]:
    return [float(index) for index in range(len(completions))]


SILENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "dapo": (constant, {}),
    "grpo in TRL's update": (constant, {"loss_type": "grpo", "shared_prefix": False}),
    "luspo": (constant, {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "vespo": (nothing, {"loss_type": "vespo"}),
    "no reward, in TRL's update": (nothing, {"shared_prefix": False}),
    "a KL term, two updates": (constant, {"beta": 0.1, "num_iterations": 2, "max_steps": 2}),
    "truncated, of one token": (
        by_length,
        {"max_completion_length": 1, "mask_truncated_completions": True},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_steps_without_a_signal_change_nothing(tmp_path: Path, name: str) -> None:
    """From the first step on, for every loss, in both updates: 0 gradient, and a whole record."""
    function, settings = SILENT[name]
    few = {"num_generations": 8, "max_completion_length": 8, "save_steps": 2}
    settings = {**SMALL, **few, **settings}
    trainer = make_trainer(tmp_path, rewards=[Reward("own", function)], **settings)
    before = [parameter.clone() for parameter in trainer.trained]
    recorder = Recorder(trainer, TrainConfig(**settings), tmp_path, Display(quiet=True))
    trainer.add_callback(recorder)
    trainer.train()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(rows) == settings["max_steps"] and not any(map(had_signal, rows))
    assert {row["grad_norm"] for row in rows} == {0.0}
    assert all(map(torch.equal, before, trainer.trained))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_completions_that_end_at_once(tmp_path: Path, monkeypatch, beta: float) -> None:
    """Empty texts of one token, EOS; rewards that differ all the same have a gradient."""
    trainer = make_trainer(tmp_path, rewards=[Reward("own", by_length)], beta=beta)
    ends = trainer.eos_token_ids[:1]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda ids, *_: ([ends] * len(ids), None))
    trainer.train()
    row = describe_step(trainer.step.batch, G, trainer.state.log_history[0])
    assert trainer.step.batch.completions == [""] * 16 and row["grad_norm"] > 0
    assert (row["completion_length"], row["clipped_ratio"], row["format"]) == (1.0, 0.0, 0.0)
