"""Supervised fine-tuning before GRPO: a few steps on worked solutions teach the adapter the format.

The loss is the mean negative log-prob of the completions' tokens, from the same computation as
GRPO's update: prompts without padding, no whole logits. Its end is an adapter of its own, in the
folder `start` of the run.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.worked import Worked
from lora_grpo.grpo.batch import StepState
from lora_grpo.grpo.packed_update import computing_packed
from lora_grpo.grpo.settings import order_problems
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.machine.allocator import giving_back
from lora_grpo.machine.files import append_jsonl
from lora_grpo.machine.out_of_memory import UPDATE, RowLimit, largest_part
from lora_grpo.policy.adapter import METRICS
from lora_grpo.policy.base import Placement
from lora_grpo.policy.checkpoints import WholeCheckpoints
from lora_grpo.train.console import Display
from lora_grpo.train.recorder import StopOnSignal, finite

IGNORED = -100  # a label that does not count, as transformers writes it
MAX_GRAD_NORM = 1.0  # transformers' own; GRPO's smaller one is for its rare, noisy signal


def rows_at_once(config: TrainConfig, longest_prompt: int) -> int:
    """Return how many worked problems one micro-batch holds: as many as have no more tokens than
    GRPO's, which repeats no prompt, and a whole number of which make a step."""
    completions = config.per_device_train_batch_size * config.max_completion_length
    each = longest_prompt + config.max_completion_length
    return largest_part(config.prompts_per_step, max(1, (longest_prompt + completions) // each))


def sft_arguments(
    config: TrainConfig, output_dir: Path, placement: Placement, longest_prompt: int
) -> TrainingArguments:
    """Return the settings of transformers' trainer: a step has as many problems as one of GRPO."""
    rows = rows_at_once(config, longest_prompt)
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.sft_steps,
        learning_rate=config.sft_learning_rate,
        lr_scheduler_type="linear",
        weight_decay=config.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optim=config.optim,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=config.prompts_per_step // rows,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=placement.dtype == "bfloat16",
        fp16=placement.dtype == "float16",
        use_cpu=placement.device == "cpu",
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def collate(rows: Sequence[Worked], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return a micro-batch as TRL pads it, prompts on the left and completions on the right:
    `input_ids` and `attention_mask` (B, P + T), and the labels (B, T)."""

    def pad(lists: list[list[int]], side: str, value: int) -> torch.Tensor:
        return pad_sequence(
            [torch.tensor(ids) for ids in lists], True, padding_value=value, padding_side=side
        )

    prompts, completions = [r.prompt_ids for r in rows], [r.completion_ids for r in rows]
    parts = ((prompts, "left"), (completions, "right"))
    ones = [([[1] * len(ids) for ids in lists], side) for lists, side in parts]
    labels = pad(completions, "right", IGNORED)
    return {
        "input_ids": torch.cat([pad(lists, side, pad_token_id) for lists, side in parts], 1),
        "attention_mask": torch.cat([pad(lists, side, 0) for lists, side in ones], 1),
        "labels": labels,
        "shift_labels": labels,  # which transformers counts for `num_items_in_batch`
    }


@contextmanager
def supervised(policy: LoraGRPOTrainer, mask: torch.Tensor) -> Iterator[None]:
    """Let the trainer compute the log-probs of all rows, at a temperature of 1, in the block."""
    temperature, policy.temperature = policy.temperature, 1.0
    ones = torch.ones(len(mask), device=mask.device)
    policy.step.inputs = {"completion_mask": mask, "advantages": ones}
    try:
        yield
    finally:
        policy.step.inputs, policy.temperature = None, temperature


class SupervisedTrainer(WholeCheckpoints, Trainer):
    """transformers' trainer with the log-probs of the run's GRPO trainer, on the same adapter."""

    def __init__(
        self, policy: LoraGRPOTrainer, args: TrainingArguments, worked: Sequence[Worked]
    ) -> None:
        tokenizer = policy.processing_class
        count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
            # Another order than GRPO's, which would begin with the same problems.
            train_dataset=order_problems(worked, count, f"sft {args.seed}"),
            processing_class=tokenizer,
        )
        self.policy = policy
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of a whole step
        self.rows = RowLimit(UPDATE, print)
        self.remove_callback(PrinterCallback)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any
    ) -> torch.Tensor:
        whole, step, policy = len(inputs["input_ids"]), super().training_step, self.policy
        packed = computing_packed(policy.inner_model()) if policy.packed else nullcontext()
        width, device = policy.model.config.get_text_config().hidden_size, policy.model.device.type
        with packed, giving_back(width, device):
            return self.rows.run(lambda rows: step(model, inputs, *rest), whole, at_least=whole)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the completions' negative log-probs, divided by the tokens of the whole step."""
        mask = (inputs["labels"] != IGNORED).long()
        batch = (inputs["input_ids"], inputs["attention_mask"], mask.shape[1])
        with supervised(self.policy, mask):
            logps, _, _ = self.policy._get_per_token_logps_and_entropies(
                self.policy.model, *batch, compute_entropy=True
            )
        loss = -(logps * mask).sum() / num_items_in_batch
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"--sft-steps: the loss became {loss.item()} in step {self.state.global_step + 1}: "
                f"start anew with a lower --sft-learning-rate (now {self.args.learning_rate:g})"
            )
        return loss


class SupervisedRecorder(StopOnSignal):
    """Records and shows each step, and saves a checkpoint where one is due."""

    def __init__(self, folder: Path, save_steps: int, display: Display) -> None:
        super().__init__()
        self.folder, self.save_steps, self.display = folder, save_steps, display
        self.started = 0.0

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        stopping = self.stopped_by is not None
        control.should_training_stop |= stopping
        control.should_save = stopping or state.global_step % self.save_steps == 0
        return control

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if "train_runtime" in logs:  # the summary of all steps
            return
        kept = {name: logs.get(name) for name in ("loss", "grad_norm", "learning_rate")}
        seconds = time.perf_counter() - self.started
        row = finite({"step": state.global_step, **kept, "seconds": seconds})
        append_jsonl(self.folder / METRICS, [row])
        self.display.sft_step(row, state.max_steps)


def fine_tune(
    policy: LoraGRPOTrainer,
    config: TrainConfig,
    placement: Placement,
    longest_prompt: int,
    worked: Sequence[Worked],
    recorder: SupervisedRecorder,
    checkpoint: Path | None,
) -> bool:
    """Make the steps that are left after the checkpoint; return whether all are made now.

    Raises:
        FloatingPointError: a loss is not finite.
        MemoryExhaustedError: a micro-batch does not fit into memory.
    """
    args = sft_arguments(config, recorder.folder, placement, longest_prompt)
    trainer = SupervisedTrainer(policy, args, worked)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # Its autocast would stay around the model's forward pass.
    trainer.accelerator.unwrap_model(policy.model, keep_fp32_wrapper=False)
    policy.step = StepState()
    policy.model.zero_grad()
    return trainer.state.global_step >= config.sft_steps
