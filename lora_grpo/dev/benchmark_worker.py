"""One side of one comparison, measured in a process of its own; `benchmark` starts it.

    python -m lora_grpo.dev.benchmark_worker RUN.json RESULT.json
    python -m lora_grpo.dev.benchmark_worker adapter MODEL ADAPTER
    python -m lora_grpo.dev.benchmark_worker merge MODEL ADAPTER OUTPUT

Both sides get the same model, data, seed, settings and rewards; each is what its own user would
run. Both are timed by the same hooks on TRL's trainer.
"""

import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.dev.benchmark import PROJECT, TRL, Run
from lora_grpo.machine.files import write_json
from lora_grpo.machine.process import watch_memory

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from lora_grpo.policy.open import Policy
    from lora_grpo.train.plan import Plan


def build_reward(one_in: int, num_generations: int) -> Callable[..., list[float]]:
    """Return a reward that differs within one group in `one_in`, and is 0 in the others."""

    def by_its_text(completions: list[Any], **_: Any) -> list[float]:
        return [
            0.0
            if (index // num_generations) % one_in
            else zlib.crc32(f"{index} {completion}".encode()) % 1000 / 1000
            for index, completion in enumerate(completions)
        ]

    return by_its_text


def make_benchmark_plan(run: Run) -> "Plan":
    """Return the plan of a training run with this run's flags and rewards."""
    from lora_grpo.config.presets import parse_train_config
    from lora_grpo.rewards.builtin import Reward
    from lora_grpo.train.plan import make_plan

    steps = str(run.warmup_steps + run.steps)
    flags = ("--backend", "transformers", "--rollout", "generate", "--max-steps", steps)
    config, _ = parse_train_config([*run.flags, *flags, "--seed", str(run.seed)])
    plan = make_plan(config)
    if run.one_live_in is None:
        return plan
    function = build_reward(run.one_live_in, config.num_generations)
    return replace(plan, rewards=[Reward("by_its_text", function)])


def build_project(plan: "Plan", folder: Path, policy: "Policy") -> "GRPOTrainer":
    """Return the trainer as scripts/train_lora.py makes it."""
    from lora_grpo.train.console import Display
    from lora_grpo.train.run import build_trainer

    record = {"warmup_steps": 0, "shared_prefix": plan.config.shared_prefix}
    return build_trainer(replace(plan, run_dir=folder), policy, record, Display())


def build_trl(plan: "Plan", folder: Path, policy: "Policy") -> "GRPOTrainer":
    """Return TRL's own trainer with the same settings."""
    import torch
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from lora_grpo.grpo.settings import build_dataset, grpo_config, lora_config

    torch.manual_seed(plan.config.seed)  # the adapter's first weights
    trainer = GRPOTrainer(
        model=policy.model,
        reward_funcs=[reward.function for reward in plan.rewards],
        args=grpo_config(plan.config, folder, plan.placement, plan.steps, 0, plan.rewards),
        train_dataset=build_dataset(plan.config, plan.data.train, plan.data.style, plan.steps),
        processing_class=plan.tokenizer,
        peft_config=lora_config(plan.config),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fix_tokens(trainer: "GRPOTrainer", prompt: int, completion: int) -> None:
    """Let the trainer learn from these lengths of random tokens, the same on both sides."""
    import torch

    draw = torch.Generator().manual_seed(0)
    vocabulary = trainer.model.config.vocab_size

    def tokens(count: int) -> list[int]:
        # The ends of a vocabulary are its special tokens.
        few, most = vocabulary // 10, vocabulary * 9 // 10
        return torch.randint(few, most, (count,), generator=draw).tolist()

    question = tokens(prompt)
    trainer._tokenize_prompts = lambda prompts: ([question] * len(prompts), None, {})
    trainer._generate_single_turn = lambda prompt_ids, *_: (
        [tokens(completion) for _ in prompt_ids],
        None,
    )


def time_steps(trainer: "GRPOTrainer", device: str) -> list[dict[str, float]]:
    """Return the list to which each step adds its seconds, those of the sampling and of the rest,
    and its tokens."""
    import torch
    from transformers import TrainerCallback

    rows: list[dict[str, float]] = []
    step: dict[str, float] = {}
    generate = trainer._generate

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(*arguments: Any) -> Any:
        started = now()
        result = generate(*arguments)
        step["generate"] += now() - started
        step["tokens"] += sum(map(len, result[1]))
        return result

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            step.update(began=now(), generate=0.0, tokens=0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step["seconds"] = now() - step.pop("began")
            rows.append({**step, "update": step["seconds"] - step["generate"]})

    trainer._generate = timed
    trainer.add_callback(Clock())
    return rows


def run_steps(run: Run) -> dict[str, Any]:
    """Make the steps of one side; return those after the warm-up, and the run's peak memory."""
    from lora_grpo.policy.base import load_base
    from lora_grpo.policy.open import TransformersPolicy

    plan = make_benchmark_plan(run)
    config, placement = plan.config, plan.placement
    peak = watch_memory(placement.device, plan.free_before)
    base = load_base(plan.folder, placement, config.load_in_4bit, config.bnb_4bit_use_double_quant)
    policy = TransformersPolicy(base, plan.tokenizer, config.eval_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        build = {PROJECT: build_project, TRL: build_trl}[run.side]
        trainer = build(plan, Path(folder), policy)
        if run.lengths:
            fix_tokens(trainer, *run.lengths)
        rows = time_steps(trainer, placement.device)
        trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return {"rows": rows[run.warmup_steps :], "peak_bytes": peak.bytes(), "grad_norms": norms}


def load_stored(model: str) -> Any:
    """Return a model in the type that it is stored in."""
    from transformers import AutoModelForCausalLM

    from lora_grpo.policy.base import resolve_model

    return AutoModelForCausalLM.from_pretrained(
        resolve_model(model), dtype="auto", trust_remote_code=False
    )


def make_adapter(model: str, adapter: str) -> None:
    """Write an adapter of random weights for a model, as PEFT saves one."""
    from peft import get_peft_model

    from lora_grpo.config.train_config import TrainConfig
    from lora_grpo.grpo.settings import lora_config

    settings = replace(lora_config(TrainConfig()), init_lora_weights=False)
    get_peft_model(load_stored(model), settings).save_pretrained(adapter)


def merge_by_peft(model: str, adapter: str, output: str) -> None:
    """Merge as PEFT's guide does: load, `merge_and_unload`, save."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_stored(model), adapter).merge_and_unload()
    merged.save_pretrained(output)


def main(run_path: str, result_path: str) -> None:
    """Measure the steps of one run and write what was measured."""
    run = Run(**json.loads(Path(run_path).read_text(encoding="utf-8")))
    if run.side == PROJECT:
        from lora_grpo.machine.allocator import prepare_allocator

        prepare_allocator()
    write_json(Path(result_path), run_steps(run))


if __name__ == "__main__":
    commands = {"adapter": make_adapter, "merge": merge_by_peft}
    if sys.argv[1] in commands:
        commands[sys.argv[1]](*sys.argv[2:])
    else:
        main(*sys.argv[1:])
