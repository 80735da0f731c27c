"""The largest micro-batch that a run can meet, computed once before its first step: what does not
fit into memory shows in the first minute, not when the longest prompt is drawn.
"""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.grpo.batch import StepState
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.train.plan import Plan

CERTAIN = 0.5  # a predicted peak of less than this share of the memory fits without a trial


def might_not_fit(plan: Plan) -> bool:
    """Return whether the largest micro-batch is worth its time. Unsloth's loss is not tried: it has
    needs of its own."""
    if plan.config.backend == "unsloth":
        return False
    return plan.memory is None or plan.memory.peak_bytes > CERTAIN * plan.memory.budget_bytes


class LargestFirst(TrainerCallback):
    """Makes a backward pass of the longest prompts and completions, and forgets its gradient.

    The trainer remembers how many rows fit at once, so that the run begins with what fits. Neither
    random numbers nor metrics change.
    """

    def __init__(
        self, trainer: LoraGRPOTrainer, config: TrainConfig, prompt_length: int, device: str
    ) -> None:
        self.trainer, self.config, self.device = trainer, config, device
        self.prompts = config.prompts_at_once(trainer.packed)
        self.prompt_length, self.done = prompt_length, False

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if self.done:
            return
        trainer, self.done = self.trainer, True
        metrics = {name: [*found] for name, found in trainer._metrics["train"].items()}
        kept = trainer.step, trainer._step, trainer._current_train_step_time
        inputs, started = self.build_inputs(), time.perf_counter()
        trainer.step = StepState(part=inputs)  # `_prepare_inputs` hands a part on as it is
        devices = [self.device] if self.device == "cuda" else []
        with torch.random.fork_rng(devices):
            trainer.training_step(more["model"], inputs, None)
        trainer.step, trainer._step, trainer._current_train_step_time = kept
        for parameter in trainer.trained:
            parameter.grad = None
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(metrics)
        trainer.say(
            f"the largest micro-batch fits: {self.prompts} x {self.prompt_length} tokens of "
            f"prompts, {len(inputs['advantages'])} x {self.config.max_completion_length} of "
            f"completions, {time.perf_counter() - started:.1f} s"
        )

    def build_inputs(self) -> dict[str, torch.Tensor]:
        """Return a micro-batch as TRL's loss takes it: B rows of P + T tokens, all of them with an
        advantage."""
        config, size = self.config, self.config.per_device_train_batch_size
        prompt = torch.ones(size, self.prompt_length, dtype=torch.long, device=self.device)
        completion = prompt.new_ones(size, config.max_completion_length)
        rows = torch.arange(size, device=self.device)
        own, scores = prompt.clone(), completion.float()
        own[:, 0] = rows * self.prompts // size  # so that prompts differ
        inputs = {
            "prompt_ids": own,
            "prompt_mask": prompt,
            "completion_ids": completion,
            "completion_mask": completion,
            "advantages": 1.0 - 2.0 * (rows % 2),
            "num_items_in_batch": completion.sum() * config.gradient_accumulation_steps,
        }
        if config.beta:
            inputs["ref_per_token_logps"] = scores - 1
        if self.trainer.use_vllm and self.trainer.vllm_importance_sampling_correction:
            inputs["importance_sampling_ratio"] = scores[:, :1]
        return inputs
