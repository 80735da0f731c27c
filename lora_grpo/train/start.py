"""Where GRPO starts from, if not from a fresh adapter: a given one, or one that supervised
fine-tuning has taught the format, or both in this order.

It lies in the run's folder `start`, is evaluated beside the base and the trained adapter, and with
beta it is the reference, not the bare base.
"""

import shutil
from pathlib import Path

from transformers import set_seed

from lora_grpo.grpo.reference import keep_reference
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.policy.adapter import START, WEIGHTS, load_weights, save_adapter
from lora_grpo.policy.checkpoints import list_checkpoints
from lora_grpo.train.console import Display
from lora_grpo.train.plan import Plan
from lora_grpo.train.recorder import (
    Stopped,
    clear_leftovers,
    return_to_checkpoint,
    stop_on_signals,
)
from lora_grpo.train.sft import SupervisedRecorder, fine_tune


def prepare_start(plan: Plan, trainer: LoraGRPOTrainer, display: Display) -> None:
    """Give the trainer the adapter that GRPO starts from; a resumed run reads the one it made.

    Raises:
        Stopped, FloatingPointError, MemoryExhaustedError: see `train.sft`.
    """
    if plan.config.start is None:
        return
    folder = plan.run_dir / START
    if not (folder / WEIGHTS).is_file():
        make_start(plan, trainer, folder, display)
    clear_leftovers(folder)
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    load_weights(trainer.model, folder / WEIGHTS)
    if plan.config.beta:
        keep_reference(trainer.model)


def make_start(plan: Plan, trainer: LoraGRPOTrainer, folder: Path, display: Display) -> None:
    """Read the adapter that is given, fine-tune on the worked solutions, from the newest checkpoint
    if there is one, and save the result."""
    config = plan.config
    if plan.given is not None:
        load_weights(trainer.model, plan.given / WEIGHTS)
    if not config.sft_steps:
        return save_adapter(trainer.model, folder, step=0)
    checkpoint = return_to_checkpoint(folder)
    recorder = SupervisedRecorder(folder, config.save_steps, display)
    set_seed(config.seed)
    with stop_on_signals(recorder):
        done = fine_tune(
            trainer,
            config,
            plan.placement,
            plan.data.longest_prompt,
            plan.worked,
            recorder,
            checkpoint,
        )
    if done:
        save_adapter(trainer.model, folder, config.sft_steps)
    if recorder.stopped_by is not None:
        raise Stopped(recorder.stopped_by)
