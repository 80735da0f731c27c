"""What each tracker holds of a run, read back by its own means: step -> figures, and the steps that
have a table of completions."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = "lora-grpo"


@dataclass
class Log:
    """Every figure by name and step, each in the order in which it was sent, without the prefix
    `train/`; the tables' rows by step; the settings."""

    figures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tables: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    runs: int = 1

    def add(self, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if name != "train/global_step" and not name.startswith("_"):
                self.figures.setdefault(name.removeprefix("train/"), []).append((step, value))


def read_tensorboard(run_dir: Path, run_id: str) -> Log:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "runs"))
    events.Reload()
    log = Log()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            log.add(event.step, {name: event.value})
    (text,) = events.Tensors("args/text_summary")[-1].tensor_proto.string_val
    log.settings = json.loads(text)
    return log


def read_trackio(run_dir: Path, run_id: str) -> Log:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    log = Log(runs=len(trackio.Api().runs(PROJECT)))
    log.settings = SQLiteStorage.get_run_config(PROJECT, run_id)
    for row in SQLiteStorage.get_logs(PROJECT, run_id):
        step = row.pop("step")
        if table := row.pop("completions", None):
            log.tables[step] = table["_value"]
        log.add(step, {name: value for name, value in row.items() if name != "timestamp"})
    return log


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def read_wandb(run_dir: Path, run_id: str) -> Log:
    log, runs = Log(), set()
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                runs.add(record.run.run_id)
                items = record.run.config.update
                log.settings |= {item.key: json.loads(item.value_json) for item in items}
            if record.WhichOneof("record_type") == "config":
                items = record.config.update
                log.settings |= {item.key: json.loads(item.value_json) for item in items}
            if record.WhichOneof("record_type") != "history":
                continue
            keys = {tuple(item.nested_key) or (item.key,): item for item in record.history.item}
            values = {"/".join(key): json.loads(item.value_json) for key, item in keys.items()}
            step = values.get("train/global_step")
            if shown := values.get("completions/path"):
                table = json.loads((path.parent / "files" / shown).read_text())
                rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
                log.tables[step] = rows
                continue
            log.add(step, values)
    log.runs = len(runs)
    return log


def read_mlflow(run_dir: Path, run_id: str) -> Log:
    import mlflow

    client = mlflow.MlflowClient()
    mlflow.set_experiment(PROJECT)
    runs = mlflow.search_runs(experiment_names=[PROJECT], output_format="list")
    (run,) = [run for run in runs if run.info.run_name == run_id]
    log = Log(runs=len(runs), settings=run.data.params)
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            log.add(metric.step, {name: metric.value})
    for artifact in client.list_artifacts(run.info.run_id, "completions"):
        table = mlflow.load_table(artifact.path, run_ids=[run.info.run_id])
        log.tables[int(artifact.path.split("_")[1].split(".")[0])] = table.to_dict("records")
    return log


READERS = {
    "tensorboard": read_tensorboard,
    "trackio": read_trackio,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}
