"""Worked solutions as the completions that the prompt asks for: what supervised fine-tuning learns.

Training problems go in; token ids come out, the prompt's exactly as GRPO renders it and the
completion's up to the token that ends a turn, where sampling stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import (
    PromptStyle,
    build_messages,
    find_turn_end,
    perfect_completion,
    render,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Worked:
    """The token ids of a prompt and of the completion that a model should write to it."""

    prompt_ids: list[int]
    completion_ids: list[int]


def write_completion(problem: Problem, style: PromptStyle) -> str | None:
    """Return a problem's worked solution in the task's tags, without what the chat template writes
    of the answer itself; None without a worked solution, or if it does not fit between the tags."""
    if problem.solution is None:
        return None
    text = perfect_completion(problem, style.task)
    whole = text if text.startswith(style.prefill.strip()) else style.prefill + text
    verdict = style.task.judge(whole, problem.answer, problem.columns)
    return whole.removeprefix(style.prefill) if verdict.correct and verdict.format else None


def build_worked(
    problems: Sequence[Problem],
    style: PromptStyle,
    tokenizer: "PreTrainedTokenizerBase",
    max_completion_length: int,
) -> tuple[list[Worked], str]:
    """Return the problems that have a worked solution of at most `max_completion_length` tokens, as
    token ids, and a sentence about how many these are.

    Raises:
        ValueError: there is none to learn from; the message says why.
    """
    end = find_turn_end(tokenizer)
    ends = [tokenizer.eos_token_id if end is None else end]
    texts = [(problem, write_completion(problem, style)) for problem in problems]
    written = [(problem, text) for problem, text in texts if text is not None]
    if not written:
        raise ValueError(
            f"--sft-steps learns from worked solutions, and none of the {len(problems):,} training "
            "problems has one that fits between the tags (a worked solution is the text before "
            "`#### answer`): leave it out, show the format in the prompt with --one-shot, or start "
            "from an adapter that was fine-tuned elsewhere (--adapter)"
        )
    prompts = [render(tokenizer, build_messages(p.question, style)) for p, _ in written]
    prompt_ids, completion_ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (prompts, [text for _, text in written])
    )
    pairs = zip(prompt_ids, completion_ids, strict=True)
    worked = [Worked(prompt, completion + ends) for prompt, completion in pairs]
    short = [found for found in worked if len(found.completion_ids) <= max_completion_length]
    if not short:
        shortest = min(len(found.completion_ids) for found in worked)
        raise ValueError(
            "--sft-steps: every worked solution is longer than --max-completion-length "
            f"{max_completion_length}, the shortest has {shortest} tokens: raise it"
        )
    longer = len(worked) - len(short)
    cut = f"; {longer:,} of more than {max_completion_length} tokens are left out" if longer else ""
    return short, f"{len(short):,} of {len(problems):,} problems have a worked solution{cut}"
