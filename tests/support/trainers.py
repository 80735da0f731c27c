"""Trainers on the embedded model: this project's, and plain TRL's."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import Problem, load_problems
from lora_grpo.data.prompt import PLAIN
from lora_grpo.grpo.groups import Replacements
from lora_grpo.grpo.settings import build_dataset, grpo_config, lora_config
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.policy.base import EMBEDDED_FOLDER, Placement, load_base, load_tokenizer
from lora_grpo.rewards.builtin import Reward, build_rewards

CPU = Placement("cpu", "float32")
SMALL = {
    **PRESETS["tiny"],
    "max_steps": 1,
    "max_completion_length": 40,
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "load_in_4bit": False,
}


@cache
def first_problems() -> list[Problem]:
    """The first of the built-in problems, which are read once per test process."""
    return load_problems("arithmetic")[:64]


def make_trainer(
    tmp_path: Path,
    trainer_class: type = LoraGRPOTrainer,
    say: Callable[[str], None] = print,
    rewards: list[Reward] | None = None,
    replacements: Replacements | None = None,
    load: Callable[[], PreTrainedModel] | None = None,
    **knobs,
) -> GRPOTrainer:
    config = TrainConfig(**{**SMALL, **knobs})
    limit = config.max_completion_length
    rewards = rewards or build_rewards("default", max_completion_length=limit)
    model = load() if load else load_base(EMBEDDED_FOLDER, CPU, config.load_in_4bit, False)
    args = grpo_config(config, tmp_path, CPU, config.max_steps, 0, rewards)
    dataset = build_dataset(config, first_problems(), PLAIN, config.max_steps)
    tokenizer = load_tokenizer(EMBEDDED_FOLDER)
    if trainer_class is LoraGRPOTrainer:
        trainer = LoraGRPOTrainer(
            model,
            tokenizer,
            rewards,
            args,
            lora_config(config),
            dataset,
            say,
            config.shared_prefix,
            replacements,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
    torch.manual_seed(args.seed)
    return GRPOTrainer(
        model,
        [reward.function for reward in rewards],
        args,
        dataset,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )


class GradientCatcher(TrainerCallback):
    """Keeps the first step's gradients, as they are before clipping would touch them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_) -> None:
        if not self.gradients:
            self.gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
