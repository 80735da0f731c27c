"""The terms of the packed update against the tensors that it really holds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import TOKENS, adapted, job_of, load, saved_bytes, small_config
from torch.profiler import ProfilerActivity, profile
from trainers import make_trainer

from lora_grpo.config.train_config import LINEAR_LAYERS
from lora_grpo.grpo.packing import attention_in_groups, pack
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.memory.rollout import predict
from lora_grpo.memory.terms import Job
from lora_grpo.memory.update import activation_terms, update_phases, update_tokens
from lora_grpo.policy.layers import fused

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
    ("prompt", "length", "micro_batch", "checkpointing"),
    [(24, 120, 8, False), (24, 120, 8, True), (200, 16, 4, False), (96, 64, 2, True)],
)
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
    predicted = max(phase.bytes for phase in update_phases(job))
    assert predicted == pytest.approx(measured_update(tmp_path, job), rel=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("targets", "four_bit"),
    [(LINEAR_LAYERS, True), (("q_proj", "v_proj"), False), (("o_proj", "up_proj"), False)],
)
def test_a_block_saves_what_is_predicted(
    tiny_model_folder: Path, four_bit: bool, dtype: torch.dtype, targets: tuple[str, ...]
) -> None:
    prompt, length = 24, 40
    model = adapted(load(tiny_model_folder, four_bit, dtype=dtype), targets).train()
    model.enable_input_require_grads()
    inner = model.get_base_model()
    prompts = torch.randint(3, 500, (1, prompt)).expand(G, -1)
    ids = torch.cat([prompts, torch.randint(3, 500, (G, length))], 1)
    packed = pack(ids, torch.ones_like(ids), length, range(G))
    row = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    with (
        attention_in_groups(inner),
        fused(inner),
        torch.autocast("cpu", dtype, dtype != torch.float32),
    ):
        found = saved_bytes(model, lambda: inner.base_model(**row, groups=packed.groups))
    config = small_config(
        max_completion_length=length, load_in_4bit=four_bit, target_modules=targets
    )
    name = str(dtype).removeprefix("torch.")
    job = job_of(tiny_model_folder, config, prompt_length=prompt, dtype=name)
    predicted = sum(term.bytes for term in activation_terms(job))
    assert predicted == pytest.approx(found, rel=0.03)


def test_tokens_are_prompts_once_a_group_and_every_completion(tiny_model_folder: Path) -> None:
    def tokens(micro_batch: int, **more: Any) -> int:
        sizes = {"per_device_train_batch_size": micro_batch, "num_generations": 8}
        config = small_config(**sizes, gradient_accumulation_steps=48 // micro_batch, **more)
        return update_tokens(job_of(tiny_model_folder, config, prompt_length=100))

    own = TOKENS - 16 - 1
    assert tokens(16) == 2 * 100 + 16 * own
    assert tokens(8) == 100 + 8 * own
    assert tokens(2) == 100 + 2 * own
    assert tokens(12) == 2 * 100 + 12 * own
    assert tokens(6) == 2 * 100 + 6 * own, "rows 6 to 11 are of two groups"
    assert tokens(8, mask_truncated_completions=True) == 6 * 100 + 8 * own


def test_sampling_holds_each_prompt_once(tiny_model_folder: Path) -> None:
    shared = small_config(num_generations=8, per_device_train_batch_size=16)
    cache = {}
    for config in (shared, dataclasses.replace(shared, shared_prefix=False)):
        job = job_of(tiny_model_folder, config, prompt_length=1000)
        cache[config.shared_prefix] = next(
            term.bytes
            for phase in predict(job).phases
            for term in phase.terms
            if phase.name == "generation" and term.name == "KV cache"
        )
    each, own = job.shape.cache_per_token(4), 32 * (TOKENS - 16)
    assert cache == {True: (4 * 1000 + own) * each, False: (32 * 1000 + own) * each}
