"""The update: TRL's mathematics, a base that stays as it is, no trace of the micro-batch."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trainers import GradientCatcher, make_trainer
from transformers import set_seed
from trl import GRPOTrainer

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import load_problems
from lora_grpo.grpo.settings import lora_config, order_problems
from lora_grpo.policy.sampling import draw
from lora_grpo.train.plan import count_steps


def train_and_catch(tmp_path: Path, **knobs) -> tuple[GRPOTrainer, dict[str, torch.Tensor]]:
    trainer = make_trainer(tmp_path, max_grad_norm=1e9, **knobs)
    catcher = GradientCatcher()
    trainer.add_callback(catcher)
    trainer.train()
    return trainer, catcher.gradients


def hash_frozen(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_gradient_does_not_depend_on_the_micro_batch(tmp_path: Path, loss_type: str) -> None:
    shapes = [(16, 1), (4, 4), (2, 8)]
    found = [
        train_and_catch(
            tmp_path,
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
        )
        for size, count in shapes
    ]
    whole_trainer, whole = found[0]
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-4
    for trainer, gradients in found[1:]:
        assert trainer.step.batch.completions == whole_trainer.step.batch.completions
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_base_weights_are_bit_identical_after_training(tmp_path: Path, load_in_4bit: bool) -> None:
    trainer = make_trainer(tmp_path, load_in_4bit=load_in_4bit, max_steps=2)
    before = hash_frozen(trainer.model)
    trainer.train()
    assert hash_frozen(trainer.model) == before
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all(parameter.abs().max() > 0 for parameter in moved)


def test_only_the_adapter_is_trained_and_in_float32_on_a_4bit_base(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, load_in_4bit=True)
    trained = {n: p.dtype for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"num_iterations": 2},
        {"num_iterations": 2, "beta": 0.1},
        {"multi_objective_aggregation": "normalize_then_sum", "max_steps": 2},
        {"entropy_coef": 0.1, "max_steps": 2},
    ],
)
def test_steps_equal_plain_trl(
    tmp_path: Path, shared_prefix: bool, knobs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same completions are sampled, and updated on, step after step."""
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: draw(p)[:, None])
    knobs = {"max_steps": 4, "save_steps": 2, "max_completion_length": 24, **knobs}
    ours = make_trainer(tmp_path, shared_prefix=shared_prefix, **knobs)
    plain = make_trainer(tmp_path, GRPOTrainer, **knobs)
    for trainer in (ours, plain):
        set_seed(7)
        trainer.train()
    names = ("reward", "completions/mean_length", "frac_reward_zero_std")
    assert "reward" in plain.state.log_history[0]
    logs = (trainer.state.log_history[: knobs["max_steps"]] for trainer in (ours, plain))
    for mine, theirs in zip(*logs, strict=True):
        # What was sampled is logged with the first of the updates on it.
        assert [mine.get(name) for name in names] == [theirs.get(name) for name in names]
        # TRL's dead groups keep a rounding error, which normalising each reward enlarges.
        error = 1e-4 if shared_prefix else 1e-6 * ("multi_objective_aggregation" in knobs)
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=error, abs=0)


def test_batch_holds_what_trl_was_paid(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    batch, logs = trainer.step.batch, trainer.state.log_history[0]
    assert len(batch.completions) == 16
    assert sum(batch.totals()) / 16 == pytest.approx(logs["reward"], abs=1e-6)
    assert sum(batch.tokens) / 16 == pytest.approx(logs["completions/mean_length"])
    assert sum(batch.truncated) / 16 == pytest.approx(logs["completions/clipped_ratio"])
    assert batch.rows(1)[0]["rewards"].keys() == {"correctness", "format", "length_penalty"}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_config_passes_every_knob(use_rslora: bool) -> None:
    config = TrainConfig(r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=use_rslora)
    found = lora_config(dataclasses.replace(config, target_modules=("q_proj",)))
    assert isinstance(found, LoraConfig)
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 6, 0.1)
    assert (found.use_rslora, found.target_modules) == (use_rslora, {"q_proj"})


def test_order_is_whole_passes_and_a_longer_run_begins_the_same() -> None:
    problems = load_problems("arithmetic")[:10]
    short, long = order_problems(problems, 15, seed=3), order_problems(problems, 30, seed=3)
    assert long[:15] == short
    for start in (0, 10, 20):
        assert sorted(p.row for p in long[start : start + 10]) == [p.row for p in problems]
    assert order_problems(problems, 15, seed=4) != short


def test_epochs_become_steps() -> None:
    config = TrainConfig(max_steps=None, num_train_epochs=2.0, num_iterations=2, save_steps=2)
    assert config.prompts_per_step == 8
    assert count_steps(config, num_problems=20) == 10


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path)
    compute: Callable = GRPOTrainer.compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "compute_loss", lambda *a, **k: compute(*a, **k) * float("nan")
    )
    with pytest.raises(FloatingPointError, match="loss became nan"):
        trainer.train()
