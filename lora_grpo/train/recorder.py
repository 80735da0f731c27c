"""What a run writes while it trains: metrics, completions, the best adapter and checkpoints.

A resumed run first cuts the files back to its checkpoint, so that they end up as if the run had
never been interrupted.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.diagnosis.history import WINDOW, read_history
from lora_grpo.diagnosis.rules import diagnose
from lora_grpo.grpo.batch import Batch, StepState, mean
from lora_grpo.grpo.groups import dead_groups, padding_share
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.machine.files import STAGED, append_jsonl, read_jsonl, write_jsonl
from lora_grpo.machine.process import PeakMemory
from lora_grpo.policy.adapter import (
    COMPLETIONS,
    LOGS,
    METRICS,
    VALIDATION,
    WEIGHTS,
    read_step,
    save_adapter,
)
from lora_grpo.policy.checkpoints import BEST, list_checkpoints, rotate_checkpoints, step_of
from lora_grpo.report.page import REPORT, write_report
from lora_grpo.train.console import Display
from lora_grpo.train.trackers import Trackers

# A new loss scale is halved until float16 holds it: from 65,536 to 1 that takes 16 updates.
SKIPPED_IN_A_ROW = 20
LOGGED = ("loss", "grad_norm", "learning_rate", "entropy", "kl")
SAMPLER_LOGS = {
    "sampling/sampling_logp_difference/mean": "sampler_logprob_difference",
    "sampling/sampling_logp_difference/max": "sampler_logprob_difference_max",
    "sampling/importance_sampling_ratio/mean": "sampler_ratio",
    "sampling/importance_sampling_ratio/clipped": "sampler_ratio_clipped",
}


def cut_back(run_dir: Path, step: int) -> None:
    """Drop what was logged after `step`: a resumed run makes those steps again."""
    for name in LOGS:
        if (run_dir / name).exists():
            rows = read_jsonl(run_dir / name)
            write_jsonl(run_dir / name, [row for row in rows if row["step"] <= step])


def reason_to_end(
    config: TrainConfig, elapsed_seconds: float, validation: Iterable[dict[str, Any]]
) -> str | None:
    """Return why the run ends before its last step, or None where it goes on."""
    if config.max_minutes is not None and elapsed_seconds >= 60 * config.max_minutes:
        return f"--max-minutes {config.max_minutes:g} have passed"
    best = max((row["strict_accuracy"] for row in validation), default=-1.0)
    if config.stop_at_accuracy is not None and best >= config.stop_at_accuracy:
        return (
            f"a validated strict accuracy of {best:.1%} has reached --stop-at-accuracy "
            f"{config.stop_at_accuracy:g}"
        )
    return None


def elapsed_until_now(run_dir: Path) -> float:
    """Return the seconds that a run had taken at its last recorded step, 0 for a new one."""
    rows = read_jsonl(run_dir / METRICS)
    return rows[-1].get("elapsed_seconds") or 0.0 if rows else 0.0


def reason_ended(config: TrainConfig, run_dir: Path) -> str | None:
    """Return why a run ended at its last recorded step, or None if it may go on."""
    return reason_to_end(config, elapsed_until_now(run_dir), read_jsonl(run_dir / VALIDATION))


def clear_leftovers(run_dir: Path) -> None:
    """Remove only what a killed run had begun to write or to remove."""
    for path in [*run_dir.glob(f"{STAGED}*"), *run_dir.glob(f"last/{STAGED}*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    rotate_checkpoints(run_dir)


def return_to_checkpoint(run_dir: Path) -> Path | None:
    """Put the directory back to the state of its newest checkpoint, and return that, if any.

    Later steps are made again, on a GPU not bit for bit, so an adapter that was kept in one of them
    is replaced by the best one up to the checkpoint.
    """
    checkpoint = next(reversed(list_checkpoints(run_dir)), None)
    cut_back(run_dir, step_of(checkpoint) if checkpoint else -1)
    clear_leftovers(run_dir)
    if checkpoint and (checkpoint / BEST).is_file():
        staged = run_dir / f"{STAGED}{WEIGHTS}"
        shutil.copyfile(checkpoint / BEST, staged)
        staged.replace(run_dir / WEIGHTS)
    return checkpoint


def finite(value: Any) -> Any:
    """Return a figure, or a dictionary of figures, with None for what is not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_work(trainer: LoraGRPOTrainer, step_seconds: float) -> dict[str, float | None]:
    """Return a step's seconds by phase, and its throughput.

    Tokens per second count completions; in generation also those that were dropped. `tokens_update`
    counts all tokens that went through the model in the update, and `padding_share` is the share of
    padding in TRL's micro-batches.
    """
    seconds, batch = trainer.step.seconds, trainer.step.batch
    learnt = sum(batch.tokens)
    tokens = {"generate": learnt + batch.dropped_tokens, "update": learnt}
    return {
        "seconds": step_seconds,
        **{f"seconds_{phase}": spent for phase, spent in seconds.items()},
        "seconds_other": step_seconds - sum(seconds.values()),
        **{
            f"tokens_per_second_{phase}": count / seconds[phase] if seconds[phase] else None
            for phase, count in tokens.items()
        },
        "tokens_update": trainer.step.tokens_computed if trainer.packed else None,
        "padding_share": padding_share(trainer._buffered_inputs),
    }


def describe_step(batch: Batch, num_generations: int, logs: dict[str, Any]) -> dict[str, Any]:
    """Return a step's row of `metrics.jsonl`, without its step and seconds.

    TRL logs None for a figure that has no finite value in the step, such as the entropy where every
    group is dead, and leaves out what its settings do not ask for.
    """
    dead = dead_groups(batch.compared(), num_generations)
    return {
        "reward": mean(batch.totals()),
        "rewards": {name: mean(scores) for name, scores in batch.rewards.items()},
        "unscored_ratio": mean(total is None for total in batch.totals()),
        "correct": batch.correct(),
        "format": batch.formatted(),
        "completion_length": mean(batch.tokens),
        "clipped_ratio": mean(batch.truncated),
        "frac_reward_zero_std": mean(dead),
        "drawn_groups": len(dead) + batch.dropped_completions // num_generations,
        "dropped_tokens": batch.dropped_tokens,
        **{name: logs.get(name) for name in LOGGED},
        **{ours: logs[theirs] for theirs, ours in SAMPLER_LOGS.items() if theirs in logs},
    }


class Stopped(Exception):
    """The run was told to stop by a signal, and saved; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopOnSignal(TrainerCallback):
    """Remembers that a signal came, so that the training ends after the current step."""

    def __init__(self) -> None:
        self.stopped_by: int | None = None

    def stop(self, number: int, frame: FrameType | None) -> None:
        """End the run after the current step; a second signal ends it at once."""
        signal.signal(number, signal.default_int_handler)
        self.stopped_by = number
        print(
            f"\n{signal.Signals(number).name}: saving after this step (once more to stop now)",
            flush=True,
        )


@contextmanager
def stop_on_signals(recorder: StopOnSignal) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the current step."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, recorder.stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Recorder(StopOnSignal):
    """Records and shows each step, keeps the best adapter, and decides when to save and to stop.

    `validate` returns the accuracy on the validation problems, if there are any. `began` is when
    this command began, by `time.perf_counter`.
    """

    def __init__(
        self,
        trainer: LoraGRPOTrainer,
        config: TrainConfig,
        run_dir: Path,
        display: Display,
        validate: Callable[[], dict[str, Any]] | None = None,
        predicted_memory: int | None = None,
        peak_memory: PeakMemory | None = None,
        began: float | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        super().__init__()
        self.trainer, self.config, self.run_dir = trainer, config, run_dir
        self.display, self.validate = display, validate
        display.max_minutes = config.max_minutes
        self.predicted_memory = predicted_memory
        self.peak_memory = peak_memory or PeakMemory(None)
        self.trackers = trackers
        self.validated: dict[str, Any] | None = None  # in this step
        self.said: set[str] = set()  # the rules whose findings were printed
        self.started = self.step_seconds = 0.0
        # The seconds of the commands before this one count too.
        self.began = (time.perf_counter() if began is None else began) - elapsed_until_now(run_dir)
        self.elapsed_seconds = 0.0
        self.skipped_in_a_row = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.validate and self.config.start and state.global_step == 0:
            self.keep_best(0)  # so that the choice can say that GRPO did no better

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.started, self.validated = time.perf_counter(), None
        self.trainer.step = StepState(self.trainer.step.batch)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        gradients = ((name, p.grad) for name, p in self.trainer.model.named_parameters())
        broken = [n for n, grad in gradients if grad is not None and not grad.isfinite().all()]
        if not broken:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        scaled = self.trainer.accelerator.scaler is not None
        if not scaled or self.skipped_in_a_row > SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"the gradient of {broken[0]} is not finite")
        # float16: the scaler leaves this update out and halves its loss scale.

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        now, step = time.perf_counter(), state.global_step
        self.step_seconds, self.elapsed_seconds = now - self.started, now - self.began
        resumable = step % self.config.num_iterations == 0
        over = resumable and reason_to_end(self.config, self.elapsed_seconds, ()) is not None
        last = over or step >= state.max_steps
        if self.validate and (last or step % self.config.eval_steps == 0):
            self.keep_best(step)
        validation = read_jsonl(self.run_dir / VALIDATION)
        ending = reason_to_end(self.config, self.elapsed_seconds, validation) is not None
        stopping = resumable and (ending or self.stopped_by is not None)
        control.should_training_stop |= stopping
        control.should_save = stopping or last or step % self.config.save_steps == 0
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
        batch = self.trainer.step.batch
        row = finite(
            {
                "step": state.global_step,
                **describe_step(batch, self.config.num_generations, logs),
                **describe_work(self.trainer, self.step_seconds),
                "elapsed_seconds": self.elapsed_seconds,
                "peak_memory_bytes": self.peak_memory.bytes(),
                "predicted_memory_bytes": self.predicted_memory,
            }
        )
        append_jsonl(self.run_dir / METRICS, [row])
        logged = state.global_step % self.config.log_completions_steps == 0
        completions = batch.rows(state.global_step) if logged else []
        if completions:
            append_jsonl(self.run_dir / COMPLETIONS, completions)
        self.display.step(row, batch, state.max_steps, self.config.log_completions_steps)
        if self.trackers:
            self.trackers.step(row, self.validated, completions)
        if state.global_step < state.max_steps:
            self.look_at_run(state.global_step)

    def look_at_run(self, step: int) -> None:
        """Print the faults that appeared, and refresh the report, each at its interval."""
        reporting = step % self.config.report_steps == 0
        if step % WINDOW and not reporting:
            return
        findings = diagnose(read_history(self.run_dir))
        self.display.findings(found for found in findings if found.rule not in self.said)
        self.said |= {found.rule for found in findings}
        if reporting:
            write_report([self.run_dir], self.run_dir / REPORT, [*map(str, findings)])

    def keep_best(self, step: int) -> None:
        """Evaluate on the validation problems; save the adapter if no earlier step did better."""
        self.validated = row = {"step": step, **self.validate()}
        earlier = [rank(found) for found in read_jsonl(self.run_dir / VALIDATION)]
        kept = rank(row) >= max(earlier, default=(-1.0, -1.0))
        if kept:
            save_adapter(self.trainer.model, self.run_dir, step)
        append_jsonl(self.run_dir / VALIDATION, [row])
        self.display.validation(row, kept)


def rank(row: dict[str, Any]) -> tuple[float, float]:
    """Order validation results: accuracy first, then format; of equal ones the later is kept."""
    return row["strict_accuracy"], row["format_rate"]


def best_step(run_dir: Path) -> int | None:
    """Return the step of the adapter that was kept, or None if no step was validated."""
    return read_step(run_dir / WEIGHTS) if read_jsonl(run_dir / VALIDATION) else None
