"""The tasks by name, as `--task` and the record of a run name them."""

from typing import Literal

from lora_grpo.tasks.choice import CHOICE_TASK
from lora_grpo.tasks.latex import MATH_TASK
from lora_grpo.tasks.reasoning_gym import REASONING_GYM
from lora_grpo.tasks.task import NUMBER_TASK, Task
from lora_grpo.tasks.text import TEXT_TASK

TaskName = Literal["auto", "number", "choice", "text", "math", "own", "reasoning-gym"]
TASKS: dict[str, Task] = {
    task.name: task for task in (NUMBER_TASK, CHOICE_TASK, TEXT_TASK, MATH_TASK, REASONING_GYM)
}


def find_task(name: str) -> Task | None:
    """Return the task of a name, None for `auto`, which is chosen from the gold answers."""
    return None if name == "auto" else TASKS[name]
