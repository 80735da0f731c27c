"""A training run: a checked plan becomes an adapter directory, evaluated before and after.

Every stage saves its result before the next one begins, so that a run that is killed at any moment
can be resumed.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import PrinterCallback, set_seed

from lora_grpo.data.prompt import keep_settings
from lora_grpo.grpo.groups import Replacements
from lora_grpo.grpo.settings import build_dataset, dataset_rows, grpo_config, lora_config
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.grpo.vllm_rollout import attach
from lora_grpo.machine.files import (
    read_json,
    read_jsonl,
    staged_directory,
    write_json,
    write_jsonl,
)
from lora_grpo.machine.process import PeakMemory, watch_memory
from lora_grpo.policy.adapter import (
    CONFIG,
    EVAL,
    EVAL_ITEMS,
    METRICS,
    TRAIN_CONFIG,
    WEIGHTS,
    load_weights,
    read_train_config,
    save_adapter,
)
from lora_grpo.policy.checkpoints import list_checkpoints, step_of
from lora_grpo.policy.open import Policy, open_policy
from lora_grpo.results.card import write_adapter_card
from lora_grpo.results.evaluate import evaluate_model
from lora_grpo.results.scoring import STARTS, Item, build_eval_items, build_evaluation, summarise
from lora_grpo.rewards.builtin import reward_columns
from lora_grpo.rewards.calls import RewardError
from lora_grpo.train.console import Display
from lora_grpo.train.difficulty import check_kept, train_on_solvable
from lora_grpo.train.largest import LargestFirst, might_not_fit
from lora_grpo.train.lengths import describe_truncation
from lora_grpo.train.plan import Plan
from lora_grpo.train.provenance import read_record
from lora_grpo.train.recorder import (
    Recorder,
    Stopped,
    best_step,
    reason_ended,
    return_to_checkpoint,
    stop_on_signals,
)
from lora_grpo.train.start import prepare_start
from lora_grpo.train.trackers import Trackers

# `.base_items.jsonl` and so on, until the end, so that a resumed run need not repeat them.
ITEMS = "_items.jsonl"


def open_run(plan: Plan, record: dict[str, Any]) -> None:
    """Create the run's directory, or bring the record of a resumed one up to date."""
    if plan.config.resume:
        saved = read_train_config(plan.run_dir)
        if record["model"] != saved["model"]:
            for path in plan.run_dir.rglob(CONFIG):
                moved = {"base_model_name_or_path": str(plan.folder)}
                write_json(path, read_json(path) | moved)
        if record != saved:
            write_json(plan.run_dir / TRAIN_CONFIG, record)
        return
    with staged_directory(plan.run_dir) as staged:
        tokenizer = copy(plan.tokenizer)
        tokenizer.chat_template = keep_settings(tokenizer.chat_template)
        tokenizer.save_pretrained(staged)
        write_json(staged / TRAIN_CONFIG, record)


def evaluate_problems(
    plan: Plan, policy: Policy, name: str, display: Display, validation: bool = False
) -> list[Item]:
    """Return what the policy answers to the test (or validation) problems."""
    problems = plan.data.validation if validation else plan.data.test
    with display.bar(name, len(problems)) as advance:
        return evaluate_model(
            policy,
            plan.tokenizer,
            problems,
            plan.data.style,
            plan.config.max_completion_length,
            advance,
        )


def base_items(
    plan: Plan, policy: Policy, trainer: LoraGRPOTrainer, display: Display
) -> list[Item]:
    """Return the base's answers.

    The adapter is switched off: even a fresh one can change the rounding.
    """
    with trainer.model.disable_adapter():
        return items_once(plan, policy, "base", "evaluating the base", display)


def models_before(
    plan: Plan, policy: Policy, trainer: LoraGRPOTrainer, display: Display
) -> dict[str, list[Item]]:
    """Make what GRPO starts from; return the answers of the base, and of that if it is more than a
    fresh adapter."""
    start = plan.config.start
    models = {"base": base_items(plan, policy, trainer, display)}
    display.before("base", summarise(models["base"]))
    attach(policy, trainer)
    prepare_start(plan, trainer, display)
    if start:
        models[start] = items_once(plan, policy, start, "evaluating the start", display)
        display.before(STARTS[start], summarise(models[start]))
    warning = describe_truncation(models[start or "base"], plan.config.max_completion_length)
    if warning:
        display.say_always(warning)
    return models


def items_once(plan: Plan, policy: Policy, name: str, what: str, display: Display) -> list[Item]:
    """Return a model's answers before GRPO, as `eval.json` names the model; a resumed run reads
    those that were saved before."""
    finished = read_jsonl(plan.run_dir / EVAL_ITEMS)
    if finished:
        return [Item(**row[name]) for row in finished]
    path = plan.run_dir / f".{name}{ITEMS}"
    if not path.exists():
        items = evaluate_problems(plan, policy, what, display)
        write_jsonl(path, [dataclasses.asdict(item) for item in items])
    return [Item(**row) for row in read_jsonl(path)]


def open_training_policy(plan: Plan) -> AbstractContextManager[Policy]:
    """Open the base with the chosen backend, and the vLLM engine if vLLM samples."""
    config, engine = plan.config, None
    if config.backend == "unsloth":
        from lora_grpo.policy.unsloth import open_unsloth

        return open_unsloth(config, plan.folder, plan.tokenizer)
    if config.rollout == "vllm":
        from lora_grpo.policy.vllm import engine_settings

        engine = engine_settings(config, plan.placement)
    return open_policy(
        plan.folder,
        plan.tokenizer,
        plan.placement,
        config.load_in_4bit,
        config.bnb_4bit_use_double_quant,
        config.eval_batch_size,
        engine,
        to_train=True,
    )


def build_trainer(
    plan: Plan, policy: Policy, record: dict[str, Any], display: Display
) -> LoraGRPOTrainer:
    """Return the trainer of the run with a fresh adapter, without writing anything."""
    config, steps, replacements = plan.config, plan.steps, None
    if config.dynamic_sampling:  # from all training problems, also when a run is prolonged
        rows = dataset_rows(plan.data.train, plan.data.style)
        replacements = Replacements(rows, config.dynamic_sampling_rounds, config.seed)
    with TemporaryDirectory() as scratch:  # transformers' trainer creates its folder at once
        trainer = LoraGRPOTrainer(
            model=policy.model,
            tokenizer=plan.tokenizer,
            rewards=plan.rewards,
            args=grpo_config(
                config, Path(scratch), plan.placement, steps, record["warmup_steps"], plan.rewards
            ),
            # Unsloth has put the adapter on the model already.
            peft_config=None if config.backend == "unsloth" else lora_config(config),
            train_dataset=build_dataset(config, plan.data.train, plan.data.style, steps),
            say=display.say_always,
            shared_prefix=config.shared_prefix,
            replacements=replacements,
            prefill=plan.data.style.prefill,
            task=plan.data.style.task,
            columns=reward_columns(plan.data.train),
        )
    trainer.args.output_dir = str(plan.run_dir)
    trainer.remove_callback(PrinterCallback)
    # Known only after the start-up self-test.
    record["shared_prefix"] = record["shared_prefix"] and trainer.packed
    return trainer


def optimise(
    plan: Plan,
    policy: Policy,
    trainer: LoraGRPOTrainer,
    display: Display,
    peak_memory: PeakMemory | None = None,
    began: float | None = None,
    trackers: Trackers | None = None,
) -> int:
    """Make the remaining steps, and return the number of the last one.

    Raises:
        Stopped: a signal came; the run was saved first.
        FloatingPointError: a loss or gradient is not finite; the update was not made.
    """
    run_dir = plan.run_dir
    checkpoint = return_to_checkpoint(run_dir)

    def validate() -> dict[str, Any]:
        items = evaluate_problems(plan, policy, "choosing the best step", display, validation=True)
        found = summarise(items)
        kept = {name: found[name] for name in ("strict_accuracy", "ci95", "format_rate")}
        return {"num_items": len(items), **kept}

    recorder = Recorder(
        trainer,
        plan.config,
        run_dir,
        display,
        validate if plan.data.validation else None,
        plan.memory.peak_bytes if plan.memory else None,
        peak_memory,
        began,
        trackers,
    )
    if might_not_fit(plan):
        longest, device = plan.data.longest_prompt, plan.placement.device
        trainer.add_callback(LargestFirst(trainer, plan.config, longest, device))
    trainer.add_callback(recorder)
    set_seed(plan.config.seed)
    done = step_of(checkpoint) if checkpoint else 0
    with stop_on_signals(recorder), display.training(plan.steps, done):
        try:
            goes_on = reason_ended(plan.config, run_dir) is None
            if checkpoint is None or (goes_on and done < plan.steps):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:
                trainer._load_from_checkpoint(str(checkpoint))
        except FloatingPointError as error:
            raise explain_non_finite(plan, trainer, error) from error
    if recorder.stopped_by is not None and trainer.state.global_step < plan.steps:
        raise Stopped(recorder.stopped_by)
    return step_of(list_checkpoints(run_dir)[-1])


def explain_non_finite(
    plan: Plan, trainer: LoraGRPOTrainer, error: FloatingPointError
) -> FloatingPointError:
    """Save the batch that broke the update, and say what to change."""
    step = trainer.state.global_step + 1
    path = plan.run_dir / f"non_finite_step_{step}.jsonl"
    write_jsonl(path, trainer.step.batch.rows(step))
    return FloatingPointError(
        f"step {step}: {error}, so the update was not made; the step's completions are in {path}: "
        "start anew with a "
        f"lower --learning-rate (now {plan.config.learning_rate:g}) or --max-grad-norm (now "
        f"{plan.config.max_grad_norm:g}), or with --dtype float32"
    )


def keep_adapters(plan: Plan, trainer: LoraGRPOTrainer, steps: int) -> int:
    """Save the adapter after `steps`, the last one, put the best one into the model, and return the
    best one's step."""
    save_adapter(trainer.model, plan.run_dir / "last", steps)
    best = best_step(plan.run_dir)
    if best is None:
        save_adapter(trainer.model, plan.run_dir, steps)
        return steps
    load_weights(trainer.model, plan.run_dir / WEIGHTS)
    return best


def finished_report(plan: Plan) -> dict[str, Any] | None:
    """Return the `eval.json` of a resumed run that is complete already, else None."""
    path = plan.run_dir / EVAL
    if not (plan.config.resume and path.is_file() and (plan.run_dir / WEIGHTS).is_file()):
        return None
    report = read_json(path)
    if report.get("steps") == plan.steps:
        return report
    checkpoint = next(reversed(list_checkpoints(plan.run_dir)), None)
    ended = checkpoint is not None and step_of(checkpoint) == report.get("steps")
    return report if ended and reason_ended(plan.config, plan.run_dir) else None


@contextmanager
def removed_if_never_started(plan: Plan) -> Iterator[None]:
    """Remove the directory of a new run that fails in a reward before its first step: it could not
    be resumed, because the corrected reward would be a different one."""
    try:
        yield
    except (RewardError, ValueError):
        if not plan.config.resume and not read_jsonl(plan.run_dir / METRICS):
            shutil.rmtree(plan.run_dir)
        raise


def write_results(
    plan: Plan, models: dict[str, list[Item]], steps: int, best: int
) -> dict[str, Any]:
    """Write the evaluation and the card, and return the contents of `eval.json`."""
    run_dir = plan.run_dir
    report = build_evaluation(plan.data.test_name, plan.data.test_split, models)
    report |= {"best_step": best, "steps": steps}
    if steps < plan.steps:
        report["ended_early"] = reason_ended(plan.config, run_dir)
    items = build_eval_items(plan.data.test, models, plan.data.style.task)
    write_jsonl(run_dir / EVAL_ITEMS, items)
    write_json(run_dir / EVAL, report)
    write_adapter_card(run_dir)
    for path in run_dir.glob(f".*{ITEMS}"):
        path.unlink()
    return report


def train(plan: Plan, display: Display) -> dict[str, Any]:
    """Do the run, or the rest of it, and return the contents of `eval.json`.

    Raises:
        Stopped, FloatingPointError, ValueError: see `optimise` and `read_record`.
    """
    transformers.utils.logging.set_verbosity_error()
    began, run_dir = time.perf_counter(), plan.run_dir
    record = read_record(plan)
    check_kept(plan)
    peak_memory = watch_memory(plan.placement.device, plan.free_before)
    with open_training_policy(plan) as policy:
        trainer = build_trainer(plan, policy, record, display)
        open_run(plan, record)
        say, warn = display.say, display.say_always
        trackers = Trackers(run_dir, plan.config.report_to, trainer.args, record, say, warn)
        with removed_if_never_started(plan), trackers:
            models = models_before(plan, policy, trainer, display)
            if plan.config.difficulty_filter:
                train_on_solvable(plan, record, policy, trainer, display)
            display.begin(explain=plan.config.resume is None)
            steps = optimise(plan, policy, trainer, display, peak_memory, began, trackers)
            best = keep_adapters(plan, trainer, steps)
            models["adapter"] = evaluate_problems(plan, policy, "evaluating the adapter", display)
            report = write_results(plan, models, steps, best)
            trackers.result(report)
    return report
