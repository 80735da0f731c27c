"""The GRPO update: TRL's `GRPOTrainer` on the adapter alone, made exact to resume and open to look
into.

What this adds to TRL 1.14.2, each at one of its methods: `__init__` (the adapter stays in float32),
`_generate`, `_calculate_rewards` and `training_step` (what was sampled, how long it took, a stop at
a loss that is not finite), `_save_checkpoint` (whole or not at all). The mathematics is TRL's.
"""

import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from lora_grpo.config import TrainConfig
from lora_grpo.dataset import Problem
from lora_grpo.model import Placement, dequantised
from lora_grpo.prompt import PromptStyle, build_messages
from lora_grpo.rewards import Reward, has_format, parse_answer, same_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_CHECKPOINTS = 2


@dataclass
class Batch:
    """The completions that the current updates learn from, and what they earned.

    The lists have B entries; `rewards` holds weighted scores by the reward's name, None where it
    did not apply.
    """

    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)

    def totals(self) -> list[float]:
        """Return each completion's summed reward."""
        return [
            sum(score or 0.0 for score in scores)
            for scores in zip(*self.rewards.values(), strict=True)
        ]

    def correct(self) -> float:
        """Return the share of completions whose tagged answer is the gold one."""
        parsed = [parse_answer(completion) for completion in self.completions]
        pairs = zip(parsed, self.answers, strict=True)
        return sum(text is not None and same_number(text, gold) for text, gold in pairs) / len(
            parsed
        )

    def formatted(self) -> float:
        """Return the share of completions in the format asked for."""
        return sum(map(has_format, self.completions)) / len(self.completions)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Return what `completions.jsonl` records, a row a completion."""
        return [
            {
                "step": step,
                "question": self.questions[index],
                "answer": self.answers[index],
                "completion": self.completions[index],
                "tokens": self.tokens[index],
                "truncated": self.truncated[index],
                "rewards": {name: scores[index] for name, scores in self.rewards.items()},
            }
            for index in range(len(self.completions))
        ]


def order_problems(problems: Sequence[Problem], count: int, seed: int) -> list[Problem]:
    """Return `count` problems: one shuffled pass after another, the same beginning for every
    `count`."""
    draw = random.Random(seed)
    ordered: list[Problem] = []
    while len(ordered) < count:
        ordered += draw.sample(problems, len(problems))
    return ordered[:count]


def build_dataset(
    config: TrainConfig, problems: Sequence[Problem], style: PromptStyle, steps: int
) -> Dataset:
    """Return the prompts of the whole run in the order of their use: one epoch for TRL, so that a
    resume can skip.

    Each prompt is used for `num_iterations` updates.
    """
    batches = math.ceil(steps / config.num_iterations)
    ordered = order_problems(problems, batches * config.prompts_per_step, config.seed)
    return Dataset.from_list(
        [
            {
                "prompt": build_messages(p.question, style),
                "question": p.question,
                "answer": p.answer,
            }
            for p in ordered
        ]
    )


def lora_config(config: TrainConfig) -> LoraConfig:
    """Return PEFT's settings of the adapter."""
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
    """Return TRL's settings of the update."""
    passed_on = (
        "seed num_generations max_completion_length temperature top_p beta epsilon epsilon_high "
        "loss_type "
        "scale_rewards num_iterations mask_truncated_completions learning_rate lr_scheduler_type "
        "weight_decay "
        "max_grad_norm optim per_device_train_batch_size gradient_accumulation_steps "
        "gradient_checkpointing"
    )
    return GRPOConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        warmup_steps=warmup_steps,
        shuffle_dataset=False,
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
        **{name: getattr(config, name) for name in passed_on.split()},
    )


class LoraGRPOTrainer(GRPOTrainer):
    """TRL's trainer for one adapter, with the current batch and each phase's seconds at hand."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rewards: Sequence[Reward],
        args: GRPOConfig,
        peft_config: LoraConfig,
        train_dataset: Dataset,
    ) -> None:
        torch.manual_seed(args.seed)
        super().__init__(
            model=model,
            reward_funcs=[reward.function for reward in rewards],
            args=args,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        self.reward_func_names = [reward.name for reward in rewards]
        self.batch = Batch()
        self.seconds = {"generate": 0.0, "reward": 0.0}
        # TRL casts the adapter of a 4-bit base to bfloat16, whose 8 bits lose updates as small as
        # LoRA's.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _generate(self, prompts: list) -> tuple:
        started = time.perf_counter()
        try:
            with dequantised(self.model):
                generated = super()._generate(prompts)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise FloatingPointError("the policy's probabilities are not finite") from error
        self.seconds["generate"] += time.perf_counter() - started
        return generated

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list,
        completions: list,
        completion_ids_list: list[list[int]],
    ) -> torch.Tensor:
        started = time.perf_counter()
        scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        own = scores[first : first + len(prompts)]  # (B, rewards); `scores` holds every process's
        weighted = (own * self.reward_weights.to(own.device)).tolist()
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self.batch = Batch(
            questions=[row["question"] for row in inputs],
            answers=[row["answer"] for row in inputs],
            completions=[completion[0]["content"] for completion in completions],
            tokens=[len(ids) for ids in completion_ids_list],
            truncated=[ids[-1] not in ends for ids in completion_ids_list],
            rewards={
                name: [None if math.isnan(row[index]) else row[index] for row in weighted]
                for index, name in enumerate(self.reward_func_names)
            },
        )
        self.seconds["reward"] += time.perf_counter() - started
        return scores

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()}")
        return loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staged = run_dir / f".staged-{name}"
        self.args.output_dir = str(staged)
        try:
            super()._save_checkpoint(model, trial)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            (staged / name).rename(run_dir / name)
        finally:
            self.args.output_dir = str(run_dir)
            shutil.rmtree(staged, ignore_errors=True)
        rotate_checkpoints(run_dir)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, the oldest first."""
    return sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def rotate_checkpoints(run_dir: Path) -> None:
    """Keep the newest checkpoints alone; the older ones lose their names first, so that none is
    ever found half removed."""
    for old in list_checkpoints(run_dir)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old.rename(run_dir / f".old-{old.name}"))
