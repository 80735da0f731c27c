"""One side of one case, measured in a process of its own; `benchmark` starts it.

    python -m lora_grpo.dev.benchmark_worker SPEC.json RESULT.json
    python -m lora_grpo.dev.benchmark_worker adapter MODEL DIRECTORY

Both sides get the same model, data, seed, settings and rewards; each is what its own user would
run. Both are timed by the same hooks on methods of TRL's trainer.
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

from lora_grpo.dev.benchmark import PEFT, PROJECT, PROVEN, TRL
from lora_grpo.machine.process import watch_memory

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from lora_grpo.policy.open import Policy
    from lora_grpo.train.plan import Plan

Spec = dict[str, Any]
LEARNING_STEPS, CHECK_EVERY = 80, 2
GOOD_ENOUGH = 0.90  # strict accuracy on the validation problems


def build_reward(every: int, num_generations: int) -> Callable[..., list[float]]:
    """Return a reward that differs within one group in `every`, and is 0 in the others."""

    def by_its_text(completions: list[Any], **_: Any) -> list[float]:
        return [
            0.0
            if (index // num_generations) % every
            else zlib.crc32(f"{index} {completion}".encode()) % 1000 / 1000
            for index, completion in enumerate(completions)
        ]

    return by_its_text


def make_benchmark_plan(spec: Spec, steps: int) -> "Plan":
    """Return the plan of a training run with the case's flags and rewards."""
    from lora_grpo.config.presets import parse_train_config

    flags = ("--backend", "transformers", "--rollout", "generate", "--max-steps", str(steps))
    config, _ = parse_train_config([*spec["case"]["flags"], *flags, "--seed", str(spec["seed"])])
    from lora_grpo.rewards.builtin import Reward
    from lora_grpo.train.plan import make_plan

    plan, signal = make_plan(config), spec["case"]["signal"]
    if signal == "own":
        return plan
    function = build_reward(
        {"every group": 1, "half of the groups": 2}[signal], config.num_generations
    )
    return replace(plan, rewards=[Reward("by_its_text", function)])


def build_project(plan: "Plan", folder: Path, policy: "Policy") -> "GRPOTrainer":
    """Return the trainer as scripts/train_lora.py makes it."""
    from lora_grpo.train.console import Display
    from lora_grpo.train.run import build_trainer

    record = {"warmup_steps": 0, "shared_prefix": plan.config.shared_prefix}
    return build_trainer(replace(plan, run_dir=folder), policy, record, Display())


def build_trl(plan: "Plan", folder: Path, policy: "Policy") -> "GRPOTrainer":
    """Return TRL's own trainer, told the same."""
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
    policy.follow(trainer.model)
    return trainer


def fix_tokens(trainer: "GRPOTrainer", prompt: int, completion: int, vocabulary: int) -> None:
    """Let the trainer learn from these lengths of random tokens, the same on both sides."""
    import torch

    draw = torch.Generator().manual_seed(0)

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
    """Return the list to which each step adds a row of its seconds, by phase, and its tokens."""
    import torch
    from transformers import TrainerCallback

    rows: list[dict[str, float]] = []
    spent: dict[str, float] = {}

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(trainer, name)

        def call(*arguments: Any, **named: Any) -> Any:
            started = now()
            result = method(*arguments, **named)
            spent[name] += now() - started
            if name == "_generate":
                spent["tokens"] += sum(map(len, result[1]))
            return result

        return call

    methods = ("_generate", "_prepare_inputs", "training_step")
    for name in methods:
        setattr(trainer, name, timed(name))

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            spent.update(dict.fromkeys((*methods, "tokens"), 0.0), began=now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, generate = now() - spent["began"], spent["_generate"]
            update = spent["training_step"] - spent["_prepare_inputs"]
            row = {"seconds": seconds, "generate": generate, "update": update}
            rows.append(row | {"other": seconds - generate - update, "tokens": spent["tokens"]})

    trainer.add_callback(Clock())
    return rows


def run_steps(spec: Spec) -> dict[str, Any]:
    """Make the steps of one side; return those after the warm-up, and the run's peak memory."""
    from lora_grpo.policy.base import load_base
    from lora_grpo.policy.open import TransformersPolicy

    learning = spec["case"]["kind"] == "learning"
    warmup = 0 if learning else spec["warmup_steps"]
    plan = make_benchmark_plan(spec, LEARNING_STEPS if learning else warmup + spec["steps"])
    peak = watch_memory(plan.placement.device, plan.free_before)
    config = plan.config
    base = load_base(
        plan.folder, plan.placement, config.load_in_4bit, config.bnb_4bit_use_double_quant
    )
    policy = TransformersPolicy(base, plan.tokenizer, config.eval_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        build = {PROJECT: build_project, TRL: build_trl}[spec["side"]]
        trainer = build(plan, Path(folder), policy)
        if spec["case"]["lengths"]:
            fix_tokens(trainer, *spec["case"]["lengths"], base.config.vocab_size)
        rows = time_steps(trainer, plan.placement.device)
        accuracies = stop_when_good(trainer, plan, policy) if learning else []
        trainer.train()
    if learning and accuracies[-1] < GOOD_ENOUGH:
        raise RuntimeError(f"{GOOD_ENOUGH} was not reached in {len(rows)} steps")
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return {"rows": rows[warmup:], "peak_bytes": peak.bytes(), "grad_norms": norms}


def stop_when_good(trainer: "GRPOTrainer", plan: "Plan", policy: "Policy") -> list[float]:
    """End the run by its accuracy; return the list that each check's accuracy is added to."""
    from transformers import TrainerCallback

    from lora_grpo.results.evaluate import evaluate_model
    from lora_grpo.results.scoring import summarise

    accuracies: list[float] = []

    class Check(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step % CHECK_EVERY == 0:
                length = plan.config.max_completion_length
                items = evaluate_model(
                    policy, plan.tokenizer, plan.data.validation, plan.data.style, length
                )
                accuracies.append(summarise(items)["strict_accuracy"])
                control.should_training_stop |= accuracies[-1] >= GOOD_ENOUGH
            return control

    trainer.add_callback(Check())
    return accuracies


def make_adapter(model: str, folder: Path) -> None:
    """Write an adapter of random weights for a model, as PEFT saves one."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_grpo.config.train_config import TrainConfig
    from lora_grpo.grpo.settings import lora_config
    from lora_grpo.policy.base import resolve_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        resolve_model(model), dtype="auto", trust_remote_code=False
    )
    adapted = get_peft_model(base, lora_config(TrainConfig()))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder)


def run_merge(spec: Spec) -> dict[str, Any]:
    """Merge into a new folder; return the seconds, imports and all, and the peak memory."""
    started, peak = time.perf_counter(), watch_memory("cpu", 0)
    model, adapter = spec["case"]["flags"][1], Path(spec["adapter"])
    with tempfile.TemporaryDirectory(dir=adapter.parent) as folder:
        merge = {PROJECT: merge_by_project, PEFT: merge_by_peft, PROVEN: merge_and_prove}
        merge[spec["side"]](model, adapter, Path(folder) / "merged")
        seconds = time.perf_counter() - started
    return {"rows": [{"seconds": seconds}], "peak_bytes": peak.bytes()}


def merge_by_project(model: str, adapter: Path, target: Path) -> None:
    """Do what the merge command does before its proof."""
    from lora_grpo.merge.inputs import plan_merge
    from lora_grpo.merge.write import write_side_files, write_weights

    plan = plan_merge(adapter, model)
    target.mkdir()
    write_weights(plan, target, lambda nbytes: None)
    write_side_files(plan, target)


def merge_and_prove(model: str, adapter: Path, target: Path) -> None:
    """Do what the merge command does, with the proof of the logits."""
    from lora_grpo.merge.command import MergeConfig, merge_adapter

    merge_adapter(MergeConfig(adapter, target, model, proof="logits"), report=lambda line: None)


def merge_by_peft(model: str, adapter: Path, target: Path) -> None:
    """Merge as PEFT's guide does: load, `merge_and_unload`, save."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_grpo.policy.base import resolve_model

    source = resolve_model(model)
    base = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(target)


def main(spec_path: str, result_path: str) -> None:
    """Do what the spec says and write what was measured."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    if spec["side"] == PROJECT:
        from lora_grpo.machine.allocator import prepare_allocator

        prepare_allocator()
    found = run_merge(spec) if spec["case"]["kind"] == "merge" else run_steps(spec)
    Path(result_path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "adapter":
        make_adapter(sys.argv[2], Path(sys.argv[3]))
    else:
        main(*sys.argv[1:])
