"""Read a completion, pay it, check the pay: the promised names of the room."""

from lora_grpo.data.numbers import same_number
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.rewards.builtin import Reward, build_rewards, check_gold, score

parse_answer = NUMBER_TASK.parse

__all__ = ["Reward", "build_rewards", "check_gold", "parse_answer", "same_number", "score"]
