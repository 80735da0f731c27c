"""Cards without bfloat16 train in float16: its overflows cost an update each, not the run."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import AutocastKwargs
from trainers import make_trainer

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.train.console import Display
from lora_grpo.train.recorder import SKIPPED_IN_A_ROW, Recorder

LARGEST_FLOAT16 = 65504.0
STEPS = 9


def limit_to_float16(gradient: torch.Tensor) -> torch.Tensor:
    """What float16 makes of a gradient that is too large for it."""
    return torch.where(gradient.abs() > LARGEST_FLOAT16, torch.inf, gradient)


def train(monkeypatch, tmp_path: Path, scale: float | None, hook=limit_to_float16):
    """Train with PyTorch's own loss scaling; return the trainer, its rows and lora_B's sizes."""
    settings = {"max_steps": STEPS, "save_steps": STEPS, "max_completion_length": 16}
    trainer = make_trainer(tmp_path, max_grad_norm=1.0, **settings)
    if scale is not None:
        # As Accelerate sets itself up for float16, which it does on a GPU alone.
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        trainer.accelerator.native_amp = True
        trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for parameter in trainer.trained:
            parameter.register_hook(hook)
    rows: list[dict] = []
    sizes: list[float] = []

    class Keeping(Display):
        def step(self, row: dict, *_) -> None:
            rows.append(row)
            sizes.append(max(p.abs().max().item() for n, p in parameters if "lora_B" in n))

    parameters = list(trainer.model.named_parameters())
    config = TrainConfig(num_generations=4, log_completions_steps=100, save_steps=STEPS)
    trainer.add_callback(Recorder(trainer, config, tmp_path, Keeping(quiet=True)))
    trainer.train()
    return trainer, rows, sizes


def test_overflowing_updates_are_left_out_until_the_scale_fits(tmp_path: Path, monkeypatch) -> None:
    trainer, rows, sizes = train(monkeypatch, tmp_path, scale=2.0**24)
    skipped = [index for index, row in enumerate(rows) if row["grad_norm"] is None]
    assert skipped[0] == 0 and 1 < len(skipped) < STEPS - 1
    assert all(sizes[index] == (sizes[index - 1] if index else 0) for index in skipped)
    assert sizes[-1] > 0 and sizes[-1] != sizes[-2]
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (24 - len(skipped))


def test_scaling_does_not_change_an_update_that_fits(tmp_path: Path, monkeypatch) -> None:
    _, plain, _ = train(monkeypatch, tmp_path / "plain", scale=None)
    _, scaled, _ = train(monkeypatch, tmp_path / "scaled", scale=2.0**10)
    for mine, theirs in zip(scaled, plain, strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_gradient_that_never_fits_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lora_grpo.train.recorder.SKIPPED_IN_A_ROW", 3)
    with pytest.raises(FloatingPointError, match=r"gradient of .*lora_A.* is not finite"):
        train(monkeypatch, tmp_path, 2.0**24, lambda gradient: torch.full_like(gradient, torch.inf))
    assert SKIPPED_IN_A_ROW > 16, "a fresh scale of 65,536 may need that many halvings"
