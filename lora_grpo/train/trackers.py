"""`--report-to`: sends a run's rows to experiment trackers, by transformers' integrations.

A tracker gets each row of `metrics.jsonl` once, also when the run is resumed, or gets the tracker
only then: `trackers.json` says what each has. One that fails is dropped, and the run goes on.
"""

import importlib.util
import io
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.machine.files import read_json, read_jsonl, write_json
from lora_grpo.policy.adapter import COMPLETIONS, METRICS, VALIDATION

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

TRACKERS = "trackers.json"
PROJECT = "lora-grpo"
TENSORBOARD_FOLDER = "runs"  # transformers' name for it
FOLDERS = frozenset({"adapters_dir", "config", "resume"})  # of this machine; no setting of training
TEXTS = frozenset({"system_prompt", "example"})  # where a leading "/" is no path: "/no_think"
VALIDATED = ("strict_accuracy", "format_rate")
MODELS = frozenset({"base", "sft", "start", "adapter"})
TESTED = ("strict_accuracy", "lenient_accuracy", "format_rate", "truncated_rate")
WAIT_FOR_UPLOAD = 300.0  # seconds that wandb may take at the end; its own default is for ever


def check_trackers(names: Iterable[str]) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ValueError: its package cannot be found.
    """
    for name in names:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {name}: {name} is not installed: pip install "
                f"'lora-grpo[{name}]', in a checkout '.[{name}]', or leave it out"
            )


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the metrics or of the completions, with `rewards/NAME` for each reward."""
    rewards = {f"rewards/{name}": value for name, value in row.get("rewards", {}).items()}
    return {name: value for name, value in row.items() if name != "rewards"} | rewards


def public_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run's record as trackers get it: of a path of this machine only the last part."""

    def public(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [public(part) for part in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return {
        name: value if name in TEXTS else public(value)
        for name, value in record.items()
        if name not in FOLDERS
    }


@dataclass(frozen=True)
class Tracker:
    """An open tracker: transformers' callback of it with its arguments, where to look, and how to
    send a table (if it has any), to end the tracker's run as failed or not, and to ask it back."""

    callback: "TrainerCallback"
    args: "TrainingArguments"
    where: str
    table: Callable[[int, list[dict[str, Any]]], None] | None = None
    close: Callable[[bool], None] = lambda failed: None
    last_step: Callable[[], int] | None = None  # that it holds, where a kill can lose some

    def call(self, event: str, step: int, **more: Any) -> None:
        """Let transformers' callback do what it does at this event of a training."""
        from transformers import TrainerControl, TrainerState

        state = TrainerState(global_step=step)
        getattr(self.callback, event)(self.args, state, TrainerControl(), **more)

    def send(self, step: int, figures: dict[str, float], rows: list[dict[str, Any]]) -> None:
        """Send a step's figures, and its completions as a table."""
        self.call("on_log", step, logs=dict(figures))
        if rows and self.table:
            self.table(step, [*map(flatten, rows)])


def open_tensorboard(run_dir: Path, args: "TrainingArguments") -> Tracker:
    """Write event files beside the adapter; `tensorboard --logdir adapters` shows all runs."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", run_dir / TENSORBOARD_FOLDER))
    callback = TensorBoardCallback(SummaryWriter(log_dir=str(folder.expanduser())))
    return Tracker(callback, args, f"{folder}: tensorboard --logdir {run_dir.parent}")


def open_trackio(run_dir: Path, args: "TrainingArguments") -> Tracker:
    """Write to Trackio's own folder (`TRACKIO_DIR`), or to `TRACKIO_SPACE_ID`."""
    import trackio
    from transformers.integrations import TrackioCallback
    from transformers.integrations.integration_utils import rewrite_logs

    class AtStep(TrackioCallback):
        """transformers' leaves the step out, so that Trackio would count the calls."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            trackio.log(rewrite_logs(logs), step=state.global_step)

    def table(step: int, rows: list[dict[str, Any]]) -> None:
        import pandas

        trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)

    def last_step() -> int:
        return trackio.context_vars.current_run.get()._next_step - 1

    shown = f"run {args.run_name}: trackio show --project {args.project}"
    return Tracker(AtStep(), args, shown, table, last_step=last_step)


def open_wandb(run_dir: Path, args: "TrainingArguments") -> Tracker:
    """Log to Weights & Biases, or into the run's directory with `WANDB_MODE=offline`."""
    import wandb
    from transformers.integrations import WandbCallback

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise PermissionError("nobody is logged in: run `wandb login`, or set WANDB_MODE=offline")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", args.project),
        id=args.run_name,
        name=run_dir.name,
        resume="allow",
        dir=os.environ.get("WANDB_DIR", run_dir),
        settings=wandb.Settings(silent=True, finish_timeout=WAIT_FOR_UPLOAD),
    )

    def table(step: int, rows: list[dict[str, Any]]) -> None:
        import pandas

        shown = wandb.Table(dataframe=pandas.DataFrame(rows))
        wandb.log({"completions": shown, "train/global_step": step})

    def close(failed: bool) -> None:
        wandb.finish(exit_code=int(failed))

    where = f"wandb sync {run.settings.sync_dir} will send it" if run.offline else run.url
    return Tracker(WandbCallback(), args, where, table, close)


def open_mlflow(run_dir: Path, args: "TrainingArguments") -> Tracker:
    """Log to `MLFLOW_TRACKING_URI`, or to mlflow.db in the current folder."""
    import mlflow
    from transformers.integrations import MLflowCallback

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", args.project)
    mlflow.set_experiment(experiment)
    same = f"attributes.run_name = '{args.run_name}'"
    earlier = mlflow.search_runs(
        experiment_names=[experiment], filter_string=same, output_format="list"
    )
    if earlier:
        mlflow.start_run(run_id=earlier[0].info.run_id)
        args.to_dict = dict  # its parameters can't be changed, such as a run's --max-steps
    else:
        mlflow.start_run(run_name=args.run_name)

    def table(step: int, rows: list[dict[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        mlflow.log_table(columns, f"completions/step_{step}.json")

    def close(failed: bool) -> None:
        mlflow.end_run("FAILED" if failed else "FINISHED")

    where = f"run {args.run_name} of experiment {experiment} in {mlflow.get_tracking_uri()}"
    return Tracker(MLflowCallback(), args, where, table, close)


OPEN = {
    "tensorboard": open_tensorboard,
    "trackio": open_trackio,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
}


def recorded_steps(run_dir: Path) -> Iterator[tuple[int, dict[str, float], list[dict[str, Any]]]]:
    """Yield each step that was recorded, with its figures and its completions, if any."""
    validated = {row["step"]: row for row in read_jsonl(run_dir / VALIDATION)}
    by_step = groupby(read_jsonl(run_dir / COMPLETIONS), key=lambda row: row["step"])
    completions = {step: list(rows) for step, rows in by_step}
    for row in read_jsonl(run_dir / METRICS):
        step = row["step"]
        yield step, figures_of(row, validated.get(step)), completions.get(step, [])


def figures_of(row: dict[str, Any], validated: dict[str, Any] | None) -> dict[str, float]:
    """Return the figures of a step that are known, by the names of `metrics.jsonl`, and those of
    its validation. transformers puts `train/` in front, and turns `eval_` into `eval/`."""
    figures = flatten(row) | {f"eval_{name}": (validated or {}).get(name) for name in VALIDATED}
    del figures["step"]
    return {name: value for name, value in figures.items() if value is not None}


class Trackers:
    """The trackers of a run. As a context, it opens them, and closes those that have not failed."""

    def __init__(
        self,
        run_dir: Path,
        names: Iterable[str],
        args: "TrainingArguments",
        record: dict[str, Any],
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.run_dir, self.args = run_dir, args
        self.names = [name for name in dict.fromkeys(names) if name != "none"]
        self.settings, self.say, self.warn = public_settings(record), say, warn
        self.opened: dict[str, Tracker] = {}
        path = run_dir / TRACKERS
        saved = read_json(path) if self.names and path.exists() else {}
        self.run_id = saved.get("run", f"{run_dir.name}-{uuid.uuid4().hex[:8]}")
        self.sent: dict[str, int] = saved.get("sent", {})  # the last step that each tracker has

    def __enter__(self) -> "Trackers":
        for name in self.names:
            with self.dropping(name):
                self.opened[name] = self.open(name)
                begun = f"continues after step {self.sent[name]}, " if name in self.sent else ""
                self.say(f"{name}: {begun}{self.opened[name].where}")
        if self.opened:
            for step in recorded_steps(self.run_dir):
                self.send(*step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for name, tracker in [*self.opened.items()]:
            with self.dropping(name), redirect_stdout(io.StringIO()):
                tracker.call("on_train_end", self.sent.get(name, 0))
                tracker.close(kind is not None)

    def open(self, name: str) -> Tracker:
        """Return a tracker, after it has opened the run that it has of this one, or a new one."""
        args, settings = copy(self.args), self.settings
        args.run_name, args.project, args.to_dict = self.run_id, PROJECT, lambda: settings
        # What Trackio sends to a Space stays private, and no copy of it is published at the end.
        args.hub_private_repo, args.trackio_static_space_id = True, False
        with redirect_stdout(io.StringIO()):
            tracker = OPEN[name](self.run_dir, args)
            tracker.call("on_train_begin", 0)
        if name in self.sent and tracker.last_step:
            self.sent[name] = min(self.sent[name], tracker.last_step())
        return tracker

    @contextmanager
    def dropping(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails, and say so in one sentence: the run goes on."""
        try:
            yield
        except Exception as error:
            self.opened.pop(name, None)
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            self.warn(
                f"--report-to {name} failed and gets nothing more ({reason}): the run goes on, "
                f"{METRICS} has every step, and --resume sends what {name} lacks"
            )

    def send(self, step: int, figures: dict[str, float], rows: list[dict[str, Any]]) -> None:
        """Send a step to the trackers that do not have it yet."""
        for name, tracker in [*self.opened.items()]:
            if step > self.sent.get(name, 0):
                with self.dropping(name):
                    tracker.send(step, figures, rows)
                    self.sent[name] = step

    def step(
        self, row: dict[str, Any], validated: dict[str, Any] | None, rows: list[dict[str, Any]]
    ) -> None:
        """Send a new step: its rows of `metrics.jsonl`, `validation.jsonl`, `completions.jsonl`."""
        if self.opened:
            self.send(row["step"], figures_of(row, validated), rows)
            write_json(self.run_dir / TRACKERS, {"run": self.run_id, "sent": self.sent})

    def result(self, report: dict[str, Any]) -> None:
        """Send the final evaluation, which transformers shows as `test/`."""
        figures = {
            f"test_{model}_{name}": report[model][name]
            for model in MODELS & report.keys()
            for name in TESTED
        }
        for name, tracker in [*self.opened.items()]:
            with self.dropping(name):
                tracker.send(report["steps"], figures, [])
