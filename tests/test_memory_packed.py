"""The terms of the packed update against the tensors that it really holds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_grpo import make_trainer
from test_memory import job_of, small_config
from torch.profiler import ProfilerActivity, profile

from lora_grpo.memory import Job
from lora_grpo.memory_packed import packed_phases, packed_tokens, prompts_at_once
from lora_grpo.memory_plan import plan_job
from lora_grpo.trainer import LoraGRPOTrainer

G = 4


def full_batch(trainer: LoraGRPOTrainer, rows: int, prompt: int, length: int) -> dict[str, Any]:
    """Return rows of the longest prompts and completions, every group with a signal."""
    prompts = torch.randint(3, 500, (rows // G, prompt)).repeat_interleave(G, 0)
    completions = torch.randint(3, 500, (rows, length))
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.linspace(-1, 1, rows),
        "num_items_in_batch": torch.tensor(rows * length),
    }


def measured_update(tmp_path: Path, job: Job) -> int:
    """Return the most bytes of tensors that a step's last micro-batch adds at once."""
    config = job.config
    trainer = make_trainer(tmp_path, **vars(config))
    assert trainer.packed
    rows, steps = config.completions_per_step, config.gradient_accumulation_steps
    batch = full_batch(trainer, rows, job.prompt_length, config.max_completion_length)
    trainer._generate_and_score_completions = lambda inputs: batch
    trainer.current_gradient_accumulation_steps = steps
    trainer.model.train()
    if config.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    for _ in range(steps - 1):
        trainer.training_step(trainer.model, [], None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        trainer.training_step(trainer.model, [], None)
    events = watched.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = torch.tensor([size for _, size in changes]).cumsum(0)
    earlier = 4 * job.lora_parameters * (steps > 1)
    return held.max().item() + earlier


@pytest.mark.parametrize(
    ("prompt", "length", "micro_batch"), [(24, 120, 8), (200, 16, 4), (96, 64, 2), (64, 64, 16)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_holds_what_is_predicted(
    tmp_path: Path,
    tiny_model_folder: Path,
    prompt: int,
    length: int,
    micro_batch: int,
    checkpointing: bool,
) -> None:
    config = small_config(
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=16 // micro_batch,
        max_prompt_length=prompt,
        max_completion_length=length,
        gradient_checkpointing=checkpointing,
        load_in_4bit=False,
    )
    job = job_of(tiny_model_folder, config, prompt_length=prompt)
    predicted = max(phase.bytes for phase in packed_phases(job))
    m = measured_update(tmp_path, job)
    print(
        "RESULT",
        prompt,
        length,
        micro_batch,
        checkpointing,
        [(p.name, p.bytes) for p in packed_phases(job)],
        m,
        predicted / m - 1,
    )
    assert predicted == pytest.approx(m, rel=0.08)
