"""Read a completion, pay it, check the pay: the promised names of the room."""

from lora_grpo.rewards.builtin import Reward, build_rewards, check_gold, score
from lora_grpo.rewards.calls import NotScored
from lora_grpo.tasks.numbers import same_number
from lora_grpo.tasks.task import NUMBER_TASK

parse_answer = NUMBER_TASK.parse

__all__ = [
    "NotScored",
    "Reward",
    "build_rewards",
    "check_gold",
    "parse_answer",
    "same_number",
    "score",
]
