"""What TRL and PEFT are given: the run's prompts in order, and the settings of the adapter and of
the update."""

import difflib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import TEMPLATE_SETTINGS, PromptStyle, build_messages
from lora_grpo.policy.base import Placement
from lora_grpo.rewards.builtin import Reward

Row = TypeVar("Row")


def order_problems(problems: Sequence[Row], count: int, seed: int | str) -> list[Row]:
    """Return `count` problems from shuffled passes over all of them; a larger `count` only adds
    problems at the end."""
    draw = random.Random(seed)
    ordered: list[Row] = []
    while len(ordered) < count:
        ordered += draw.sample(problems, len(problems))
    return ordered[:count]


def dataset_rows(problems: Sequence[Problem], style: PromptStyle) -> list[dict[str, Any]]:
    """Return the rows of TRL's dataset. `row` refers to the problem's other columns, which are kept
    outside: Arrow may not be able to store them, and TRL uses some names itself."""
    return [
        {
            "prompt": build_messages(problem.question, style),
            "question": problem.question,
            "answer": problem.answer,
            "row": problem.row,
        }
        for problem in problems
    ]


def build_dataset(
    config: TrainConfig, problems: Sequence[Problem], style: PromptStyle, steps: int
) -> Dataset:
    """Return the prompts of the whole run in order, as one epoch, so that a resumed run skips those
    already used. Each prompt serves `num_iterations` updates."""
    batches = math.ceil(steps / config.num_iterations)
    ordered = order_problems(problems, batches * config.prompts_per_step, config.seed)
    return Dataset.from_list(dataset_rows(ordered, style))


def lora_config(config: TrainConfig) -> LoraConfig:
    """Return PEFT's configuration of the adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
    )


def grpo_config(
    config: TrainConfig,
    output_dir: Path,
    placement: Placement,
    steps: int,
    warmup_steps: int,
    rewards: Sequence[Reward],
) -> GRPOConfig:
    """Return TRL's configuration of the update."""
    args = GRPOConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        warmup_steps=warmup_steps,
        shuffle_dataset=False,
        chat_template_kwargs=TEMPLATE_SETTINGS,
        vllm_importance_sampling_correction=True,
        **config.vllm_correction,
        reward_weights=[reward.weight for reward in rewards],
        disable_dropout=config.lora_dropout == 0,
        bf16=placement.dtype == "bfloat16",
        fp16=placement.dtype == "float16",
        use_cpu=placement.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        beta=config.beta,
        loss_type=config.loss_type,
        **config.loss_settings,
        scale_rewards=config.scale_rewards,
        multi_objective_aggregation=config.multi_objective_aggregation,
        entropy_coef=config.entropy_coef,
        num_iterations=config.num_iterations,
        mask_truncated_completions=config.mask_truncated_completions,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    # Unsloth's GRPOConfig overrides this one according to the loss type.
    args.scale_rewards = config.scale_rewards
    return args


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Turn a library's error about settings into a ValueError of one sentence."""
    try:
        yield
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the settings of {what} are refused by its library: {reason}") from error


def check_update(
    config: TrainConfig, placement: Placement, rewards: list[Reward], steps: int
) -> None:
    """Check the settings with TRL and transformers before any weights load.

    Raises:
        ValueError: an optimiser that is unknown or not installed, or a setting that TRL refuses.
    """
    known = [name.value for name in OptimizerNames]
    if config.optim not in known:
        close = difflib.get_close_matches(config.optim, known)
        raise ValueError(
            f"--optim {config.optim} is no optimiser of transformers: "
            f"{f'perhaps you meant {close[0]}' if close else 'it has ' + ', '.join(known)}"
        )
    with saying("the update"):
        args = grpo_config(config, config.adapters_dir, placement, steps, 0, rewards)
    with saying(f"--optim {config.optim}"):
        Trainer.get_optimizer_cls_and_kwargs(args)
