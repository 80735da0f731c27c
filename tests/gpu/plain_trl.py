"""The same work by TRL as its documentation has it: `GRPOTrainer`, vLLM colocated, nothing of ours.

    python tests/gpu/plain_trl.py --model FOLDER --rollout vllm --backend transformers ...

Takes train_lora.py's flags, so that prompts, rewards, adapter and step are the same; TRL's trainer
does the rest with its defaults: it merges, sends every weight to vLLM, and unmerges. Writes the
adapter and the part of metrics.jsonl that a comparison needs.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from lora_grpo.config.presets import parse_train_config
from lora_grpo.machine.files import append_jsonl
from lora_grpo.train.plan import Plan, make_plan

if TYPE_CHECKING:
    from trl import GRPOConfig

VLLM_SHARE = 0.3  # TRL's default


class Clock(TrainerCallback):
    """Times each step between the two points that train_lora.py takes, and writes it down."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" in logs:
            row = {"step": state.global_step, "seconds": self.seconds}
            row["completion_length"] = logs["completions/mean_length"]
            row |= {name: logs[name] for name in ("loss", "grad_norm")}
            append_jsonl(self.run_dir / "metrics.jsonl", [row])


def settings(plan: Plan) -> "GRPOConfig":
    """Return the step's size for TRL, all else at its defaults."""
    from trl import GRPOConfig

    from lora_grpo.data.prompt import TEMPLATE_SETTINGS

    config, placement, vllm = plan.config, plan.placement, {}
    if config.rollout == "vllm":
        longest = config.max_prompt_length + config.max_completion_length
        vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": longest}
        vllm |= {"vllm_gpu_memory_utilization": VLLM_SHARE}
    return GRPOConfig(
        output_dir=str(plan.run_dir),
        max_steps=plan.steps,
        seed=config.seed,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        reward_weights=[reward.weight for reward in plan.rewards],
        chat_template_kwargs=TEMPLATE_SETTINGS,
        shuffle_dataset=False,
        bf16=placement.dtype == "bfloat16",
        fp16=placement.dtype == "float16",
        use_cpu=placement.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **vllm,
    )


def main() -> None:
    plan = make_plan(parse_train_config()[0])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from trl import GRPOTrainer

    from lora_grpo.grpo.settings import build_dataset, lora_config
    from lora_grpo.policy.base import load_base

    config = plan.config
    plan.run_dir.mkdir(parents=True)
    trainer = GRPOTrainer(
        model=load_base(
            plan.folder, plan.placement, config.load_in_4bit, config.bnb_4bit_use_double_quant
        ),
        reward_funcs=[reward.function for reward in plan.rewards],
        args=settings(plan),
        train_dataset=build_dataset(config, plan.data.train, plan.data.style, plan.steps),
        processing_class=plan.tokenizer,
        peft_config=lora_config(config),
        callbacks=[Clock(plan.run_dir)],
    )
    trainer.train()
    trainer.save_model(str(plan.run_dir))


if __name__ == "__main__":
    main()
