"""What the rewards can pay: problems that are blank or cannot earn full marks are dropped, with a
sentence for each kind, and a system prompt that asks for other tags is refused."""

import re
from collections.abc import Sequence
from pathlib import Path

from lora_grpo.data.gold import describe_unreadable
from lora_grpo.data.problems import Problem, Reading
from lora_grpo.rewards.builtin import Reward, find_unpaid
from lora_grpo.tasks.task import Task

NAMED_ROWS = 5
SHOWN_GOLDS = 3
# What the built-in rewards read: the answer tags alone, all four tags, or no tag.
READ_ANSWER, READ_NOTHING = {"correctness", "integer"}, {"length_penalty"}
PAIR_OF_TAGS = re.compile(r"<(\w+)>(?=.*</\1>)", re.DOTALL)


def check_prompt(
    path: Path, prompt: str, rewards: Sequence[Reward], task: Task, has_example: bool
) -> list[str]:
    """Return a note where a system prompt does not ask for all tags that the built-in rewards read.

    `has_example` says whether a worked example shows the tags in place of the prompt.

    Raises:
        ValueError: it asks for other tags, or for no answer tags.
    """
    paid = {reward.name for reward in rewards if reward.sha256 is None and reward.weight}
    paid -= READ_NOTHING if task.reads_tags else {*READ_NOTHING, "correctness"}
    needed = task.tags if paid - READ_ANSWER else task.answer
    missing = [tag for tag in needed if tag not in prompt]
    others = [f"<{name}>" for name in PAIR_OF_TAGS.findall(prompt) if f"<{name}>" not in task.tags]
    if not missing or (has_example and not others):
        return []
    lacks = f"--system-prompt-file {path} does not contain {' '.join(missing)}"
    if not paid and not task.reads_tags:
        return []
    if not paid:
        return [f"{lacks}: strict accuracy and the best step count only what stands in these tags"]
    unpaid = paid if set(task.answer) & set(missing) else paid - READ_ANSWER
    if others or unpaid == paid:
        asks = f" but asks for {' '.join(dict.fromkeys(others))}" if others else ""
        raise ValueError(
            f"{lacks}{asks}: the reward{'s' if len(unpaid) > 1 else ''} "
            f"{', '.join(sorted(unpaid))} would never be paid: ask for {' '.join(task.tags)}, or "
            "pay with a reward of your own (--reward-set none --reward file.py:function)"
        )
    return [f"{lacks}: {', '.join(sorted(unpaid))} is paid only where the model writes them itself"]


class Sieve:
    """Drops problems and keeps a sentence for each kind that it dropped; a strict one stops
    instead."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.notes: list[str] = []

    def drop(self, name: str, problems: list[Problem], rows: list[int], why: str) -> list[Problem]:
        """Return the problems except those of the given rows; some of these may be gone already.

        Raises:
            ValueError: there are such rows and the sieve is strict, or nothing is left.
        """
        if not rows:
            return problems
        total = len({problem.row for problem in problems}.union(rows))
        named = f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:NAMED_ROWS]))}"
        if len(rows) > NAMED_ROWS:
            named += f" and {len(rows) - NAMED_ROWS} more"
        found = f"{name}: {len(rows)} of {total} {why} ({named})"
        if self.strict:
            raise ValueError(f"--strict-data: {found}: mend or remove them")
        self.notes.append(f"dropped from {found}")
        dropped = set(rows)
        kept = [problem for problem in problems if problem.row not in dropped]
        if not kept:
            raise ValueError(f"{found}: no usable rows are left")
        return kept


def keep_usable(
    sieve: Sieve, name: str, reading: Reading, rewards: Sequence[Reward]
) -> list[Problem]:
    """Return the problems of a split except those that are blank or cannot earn full marks.

    Raises:
        ValueError: none is left, or the sieve is strict.
    """
    sieve.notes += [note for note in reading.notes if note not in sieve.notes]
    lacking = "rows lack a question or an answer"
    problems = sieve.drop(name, reading.problems, reading.blank, lacking)
    unpaid = find_unpaid(problems, rewards, reading.task)
    if len(unpaid) == len(problems):
        raise ValueError(f"{reading.dataset}: {explain_golds(unpaid, reading.task)}")
    shown = f", such as {unpaid[0].answer!r:.40}" if unpaid else ""
    why = f"gold answers do not earn full marks against themselves{shown}"
    return sieve.drop(name, problems, [problem.row for problem in unpaid], why)


def explain_golds(problems: Sequence[Problem], task: Task) -> str:
    """Say what gold answers look like where none of them can be paid, and what to change."""
    shown = "; ".join(
        f"row {problem.row}: {problem.answer[:40]!r} from {problem.source[-60:]!r}"
        for problem in problems[:SHOWN_GOLDS]
    )
    what = describe_unreadable([problem.answer for problem in problems])
    return (
        f"none of the {len(problems)} gold answers earns full marks: they {what}, and the built-in "
        f"rewards pay {task.noun}s only ({shown}): name another column by --answer-column, what "
        f"answers are by --task, give the {task.noun} itself as the answer, or pay them by a "
        "reward of your own with --reward-set none --reward file.py:function"
    )
