"""Runs in processes of their own, which a test can kill at any moment."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lora_grpo.config.files import read_run
from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import TrainConfig

SMALL = {
    **PRESETS["tiny"],
    "preset": "tiny",
    "quiet": True,
    "max_steps": 6,
    "num_generations": 4,
    "max_completion_length": 24,
    "per_device_train_batch_size": 8,
    "num_eval_items": 16,
    "num_validation_items": 8,
    "eval_steps": 2,
    "save_steps": 2,
    "log_completions_steps": 1,
}


def train_in_process(settings: dict, outcome: Path) -> None:
    """Train in this process; runs in a child that may be killed."""
    import torch

    from lora_grpo.train.console import Display
    from lora_grpo.train.plan import make_plan
    from lora_grpo.train.run import Stopped, train

    torch.set_num_threads(1)
    if settings.get("resume"):
        saved = read_run(Path(settings["resume"]))
        settings = {**saved, **settings}
    try:
        train(make_plan(TrainConfig(**settings)), Display(quiet=True))
    except Stopped as stop:
        outcome.write_text(str(stop))
        return
    outcome.write_text("done")


def start(children, outcome: Path, **settings) -> multiprocessing.Process:
    outcome.unlink(missing_ok=True)
    process = children.Process(target=train_in_process, args=({**settings}, outcome))
    process.start()
    return process


def finish(children, outcome: Path, **settings) -> None:
    process = start(children, outcome, **settings)
    process.join(240)
    assert process.exitcode == 0 and outcome.read_text() == "done"


def lines_of(name: str, count: int) -> Callable[[Path], bool]:
    return lambda run: (run / name).exists() and (run / name).read_text().count("\n") >= count


def there(pattern: str) -> Callable[[Path], bool]:
    return lambda run: any(run.glob(pattern))


def kill_at(process: multiprocessing.Process, reached: Callable[[], bool], delay: float) -> None:
    while process.is_alive() and not reached():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
