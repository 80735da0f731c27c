"""Read a completion, pay it, check the pay: the promised names of the room."""

from lora_grpo.data.answers import parse_answer, same_number
from lora_grpo.rewards.builtin import Reward, build_rewards, score

__all__ = ["Reward", "build_rewards", "parse_answer", "same_number", "score"]
