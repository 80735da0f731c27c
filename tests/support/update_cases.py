"""One batch of completions put through this project's update and through plain TRL's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trainers import make_trainer
from trl import GRPOTrainer

from lora_grpo.grpo.trainer import LoraGRPOTrainer

G, GROUPS = 4, 3
PROMPTS = (7, 12, 4)
LENGTHS = (5, 1, 9, 3, 8, 8, 2, 6, 4, 9, 7, 1)
TEMPERATURE = 0.9


def crafted_batch(
    trainer: GRPOTrainer, dead: tuple[int, ...], truncated: tuple[int, ...], old: bool, beta: float
) -> dict[str, Any]:
    """Return what TRL's generation would: ragged rows, some groups without advantage, some rows
    masked as truncated, log-probs of an earlier policy and of the reference."""
    draw = torch.Generator().manual_seed(5)
    vocabulary = trainer.model.config.vocab_size
    rows, width, length = G * GROUPS, max(PROMPTS), max(LENGTHS)
    prompts = torch.randint(3, vocabulary, (GROUPS, width), generator=draw).repeat_interleave(G, 0)
    counts = torch.tensor(PROMPTS).repeat_interleave(G)
    prompt_mask = (torch.arange(width) >= width - counts[:, None]).long()
    mask = (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).long()
    mask[list(truncated)] = 0
    advantages = torch.randn(rows, generator=draw)
    for group in dead:
        advantages[group * G : (group + 1) * G] = 0
    batch = {
        "prompt_ids": prompts * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, vocabulary, (rows, length), generator=draw),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        now, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, attention, length
        )
    if old:
        batch["old_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=draw) * mask
    if beta:
        batch["ref_per_token_logps"] = now + 0.2 * torch.randn(now.shape, generator=draw) * mask
    return batch


def prepare(
    tmp_path: Path, kind: type, micro_batch: int, beta: float, **settings: Any
) -> tuple[GRPOTrainer, int]:
    """Return a trainer whose adapter is no longer the identity, and its micro-batches a step."""
    accumulation = G * GROUPS // micro_batch
    trainer = make_trainer(
        tmp_path,
        kind,
        num_generations=G,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_completion_length=max(LENGTHS),
        temperature=TEMPERATURE,
        beta=beta,
        **settings,
    )
    torch.manual_seed(11)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return trainer, accumulation


def update(
    tmp_path: Path,
    kind: type,
    micro_batch: int,
    dead: tuple[int, ...] = (),
    truncated: tuple[int, ...] = (),
    old: bool = False,
    beta: float = 0.0,
    change: Callable[[GRPOTrainer], None] = lambda trainer: None,
    **settings: Any,
) -> tuple[float, dict[str, torch.Tensor], GRPOTrainer]:
    """Return the loss and the gradients of one step's backward passes, and the trainer."""
    trainer, accumulation = prepare(tmp_path, kind, micro_batch, beta, **settings)
    trainer.model.train()
    if trainer.args.gradient_checkpointing:  # as `train` does at its start
        trainer.model.gradient_checkpointing_enable()
    change(trainer)
    batch = crafted_batch(trainer, dead, truncated, old, beta)
    trainer._generate_and_score_completions = lambda inputs: batch
    return *learn(trainer, accumulation), trainer


def learn(trainer: GRPOTrainer, accumulation: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of one step's backward passes."""
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.accelerator.gradient_accumulation_steps = 1
    loss = sum(trainer.training_step(trainer.model, [], None).item() for _ in range(accumulation))
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, gradients


def worst_difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient."""
    assert mine.keys() == theirs.keys() and len(theirs) > 0
    return max(((mine[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


def compare(tmp_path: Path, micro_batch: int, **case: Any) -> None:
    """Check this project's update against plain TRL's on the same batch."""
    checkpointing = case.pop("gradient_checkpointing", False)
    loss, gradients, trainer = update(
        tmp_path, LoraGRPOTrainer, micro_batch, gradient_checkpointing=checkpointing, **case
    )
    assert trainer.packed
    expected_loss, expected, _ = update(tmp_path, GRPOTrainer, micro_batch, **case)
    assert abs(loss - expected_loss) < 1e-4 * max(abs(expected_loss), 1e-2)
    assert worst_difference(gradients, expected) < 1e-4
