"""The training command: plan, then preview or train, and the next command for each end."""

from typing import TYPE_CHECKING, Any

from lora_grpo.config.presets import why_not_longer
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.prompt import build_messages, render
from lora_grpo.diagnosis.history import read_history
from lora_grpo.diagnosis.rules import diagnose
from lora_grpo.grpo.batch import had_signal
from lora_grpo.machine.allocator import prepare_allocator
from lora_grpo.machine.files import check_room, naming, read_jsonl
from lora_grpo.machine.terminal import (
    FailedError,
    command_line,
    describe_write_error,
    find_write_error,
)
from lora_grpo.memory.fit import describe_memory
from lora_grpo.policy.adapter import METRICS, VALIDATION
from lora_grpo.policy.checkpoints import KEPT_CHECKPOINTS, check_run
from lora_grpo.report.page import REPORT, write_report
from lora_grpo.rewards.calls import RewardError
from lora_grpo.train.console import Display
from lora_grpo.train.plan import Plan, describe_plan, make_plan

if TYPE_CHECKING:
    from lora_grpo.machine.out_of_memory import MemoryExhaustedError

PREVIEWED = 3
SMALL_FILES = 2**24  # tokenizer, records, completions
SHOWN_SOURCE = 80


def preview(plan: Plan, display: Display) -> None:
    """Print three training problems as the model will see them, with their gold answers and where
    these were read from."""
    for problem in plan.data.train[:PREVIEWED]:
        text = render(plan.tokenizer, build_messages(problem.question, plan.data.style))
        whole = problem.source in ("", problem.answer)
        source = "" if whole else f", from {problem.source[-SHOWN_SOURCE:]!r}"
        display.say(f"--- row {problem.row}, gold answer {problem.answer!r}{source}\n{text}")


def look_at_lengths(plan: Plan, display: Display) -> None:
    """Sample a few completions and say how long they are, without writing anything."""
    from lora_grpo.train.lengths import preview_length, with_longer_limit
    from lora_grpo.train.run import open_training_policy

    longer = with_longer_limit(plan)
    with open_training_policy(longer) as policy:
        preview_length(plan.config.max_completion_length, longer, policy, display)


def advise_on_memory(plan: Plan, error: "MemoryExhaustedError") -> str:
    """Return the plan, and the flags with which a resumed run needs less memory."""
    from lora_grpo.machine.out_of_memory import UPDATE

    config, flags = plan.config, []
    if error.work == UPDATE and not config.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    if config.rollout == "vllm":
        flags.append("a smaller --vllm-gpu-memory-utilization or --vllm-max-num-seqs")
    planned = f"the plan was: {describe_memory(plan.memory)[0][1]}; " if plan.memory else ""
    if flags:
        return f"{planned}add {' or '.join(flags)}"
    return (
        f"{planned}nothing is left to save in this run: free memory that other programs hold, or "
        f"start anew with --max-completion-length below {config.max_completion_length} or a "
        f"smaller --model ({command_line('plan_memory.py')} shows what fits)"
    )


def run(config: TrainConfig, why: str) -> int:
    """Do what the configuration asks for and return the exit status.

    0: done; 128 + n: stopped by signal n, can be resumed.

    Raises:
        OSError, ValueError: bad input, found before any weights load.
        FailedError, FloatingPointError: the run failed; the message says what to do.
    """
    prepare_allocator()
    display = Display(config.quiet and not (config.dry_run or config.preview))
    if config.resume:
        check_run(config.resume)
    try:
        plan = make_plan(config)
    except RewardError as error:
        raise ValueError(str(error)) from error
    display.plan("GRPO on a LoRA adapter", describe_plan(plan, why))
    if config.preview:
        preview(plan, display)
        return 0
    if config.length_preview:
        look_at_lengths(plan, display)
        return 0
    if config.dry_run:
        for name, value in plan.settings.items():
            display.say(f"  {name} = {value}")
        display.say("dry run: nothing was loaded, nothing was written")
        return 0
    return run_plan(plan, display)


def describe_early_end(plan: Plan, report: dict[str, Any]) -> str:
    """Return a sentence that the run ended before its last step, why, and how to prolong it."""
    reason, minutes = report["ended_early"], plan.config.max_minutes
    more = ("--stop-at-accuracy", "None")
    if minutes and reason.startswith("--max-minutes"):
        more = ("--max-minutes", f"{2 * minutes:g}")
    again = command_line("train_lora.py", "--resume", plan.run_dir, *more)
    return f"ended after step {report['steps']} of {plan.steps}: {reason}; to prolong it: {again}"


def describe_end(plan: Plan, report: dict[str, Any]) -> str:
    """Return a sentence that the run is complete, and how to prolong it."""
    if "ended_early" in report:
        return f"{plan.run_dir} {describe_early_end(plan, report)}"
    done = f"{plan.run_dir} is complete: all {plan.steps} steps are made, nothing was changed"
    if reason := why_not_longer(plan.config):
        return f"{done}; it cannot be prolonged, because {reason}"
    more = ("--resume", plan.run_dir, "--max-steps", str(2 * plan.steps))
    return f"{done}; to prolong it: {command_line('train_lora.py', *more)}"


def needed_space(plan: Plan) -> int:
    """Return the bytes that a run writes: the best and the last adapter, and checkpoints of two
    adapters and two optimiser moments each, one more than are kept while it is written."""
    adapter = 4 * plan.trained_parameters
    return (2 + (KEPT_CHECKPOINTS + 1) * 4) * adapter + SMALL_FILES


def run_plan(plan: Plan, display: Display) -> int:
    """Train and print the result, or say how to resume."""
    from lora_grpo.machine.out_of_memory import MemoryExhaustedError
    from lora_grpo.train.run import Stopped, finished_report, train

    again = f"resume it by: {command_line('train_lora.py', '--resume', plan.run_dir)}"
    try:
        report = finished_report(plan)
        if report:
            display.say_always(describe_end(plan, report))
        else:
            check_room(plan.run_dir, needed_space(plan), "--adapters-dir")
            with naming(plan.run_dir):
                report = train(plan, display)
    except OSError as error:
        if (written := find_write_error(error)) is None or not plan.run_dir.is_dir():
            raise
        raise FailedError(f"{describe_write_error(written)}; then {again}") from error
    except Stopped as stop:
        display.say(f"stopped by {stop}, everything is saved; {again}")
        return 128 + stop.number
    except KeyboardInterrupt:
        there = plan.run_dir.exists()
        display.say(f"stopped; {again}" if there else "stopped; nothing was written yet")
        return 130
    except MemoryExhaustedError as error:
        raise FailedError(f"{error}\n{advise_on_memory(plan, error)}; then {again}") from error
    steps, validation = (read_jsonl(plan.run_dir / name) for name in (METRICS, VALIDATION))
    display.results(report)
    display.memory(steps[-1])
    display.chosen(plan.run_dir, report["best_step"], report["steps"], validation)
    if "ended_early" in report:
        display.say(describe_early_end(plan, report))
    findings = diagnose(read_history(plan.run_dir))
    display.findings(findings)
    write_report([plan.run_dir], plan.run_dir / REPORT, [*map(str, findings)])
    display.say(f"report: {plan.run_dir / REPORT}")
    if any(map(had_signal, steps)):
        display.say(f"next: {command_line('merge_adapter.py', plan.run_dir)}")
    else:
        display.say_always("no step had a signal, so nothing was learnt: start a new run")
    return 0
