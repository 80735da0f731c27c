"""Check rewards before training: rank the corpus, and run a dataset's gold answers through them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lora_grpo.config.train_config import check_task
from lora_grpo.data.problems import Problem, read_problems
from lora_grpo.machine.terminal import make_console
from lora_grpo.rewards.builtin import (
    Reward,
    build_rewards,
    find_unpaid,
    parse_reward_weights,
    reward_columns,
)
from lora_grpo.rewards.calls import RewardError
from lora_grpo.rewards.corpus import Ranking, rank
from lora_grpo.rewards.own_task import choose_by_flags
from lora_grpo.tasks.kinds import TaskName
from lora_grpo.tasks.task import NUMBER_TASK, Task

SHOWN_ROWS = 10


@dataclass(frozen=True)
class CheckRewardsConfig:
    """Which rewards to check, and on which gold answers."""

    reward_set: Literal["default", "classic", "none"] = "default"
    """Built-in rewards: `default`, `classic` (the five of the widespread GSM8K recipe), `none`."""
    reward: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Your own, as path/to/file.py:function=weight."""
    reward_weight: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Change a reward's weight, as name=value."""
    dataset: str | None = None
    """File, folder or Hub name whose gold answers must each score full marks."""
    question_column: str | None = None
    """Column with the question; found by its usual name if left out."""
    answer_column: str | None = None
    """Column with the gold answer; found by its usual name if left out."""
    task: TaskName = "auto"
    """What an answer is; auto is what the gold answers show, or number without --dataset."""
    task_file: Path | None = None
    """Your own task, as in train_lora.py: a .py file with parse and same, or a reward."""
    accuracy_threshold: float = 1.0
    """With a --task-file that has only a reward: what a right answer earns of it, at least."""

    def __post_init__(self) -> None:
        check_task(self.task, self.task_file)
        if self.dataset is None and (self.question_column or self.answer_column):
            raise ValueError("--question-column and --answer-column need --dataset FILE")


def check_rewards(config: CheckRewardsConfig) -> bool:
    """Print what each completion of the corpus is paid, the rules and what broke them, and the gold
    answers that are not paid in full; return whether all is right.

    Raises:
        FileNotFoundError: the dataset or a reward's file is not there.
        ValueError: a flag, a reward or the data cannot be used.
    """
    weights = parse_reward_weights(config.reward_weight)
    task, why, problems = find_problems(config)
    rewards = build_rewards(config.reward_set, config.reward, weights, task=task)
    row = next(iter(reward_columns(problems[:1]).values()), {})
    try:
        unpaid = find_unpaid(problems, rewards, task)
        paid = next((problem for problem in problems if problem not in unpaid), None)
        ranking = rank(rewards, config.reward_set, row, task, paid)
    except RewardError as error:
        raise ValueError(str(error)) from error
    if ranking.scores:
        print_scores(rewards, ranking)
    lines = [f"task: {task.name} ({why})", *ranking_lines(ranking, task)]
    if config.dataset is not None and not task.reads_tags:
        lines.append("gold answers: not checked, the task reads more than the answer tags")
    elif config.dataset is not None and not ranking.rules:
        lines.append("gold answers: not checked, the rewards include no `correctness`")
    elif config.dataset is not None:
        paid = f"{len(problems) - len(unpaid)} of {len(problems)}"
        lines.append(f"gold answers: {paid} score full marks ({config.dataset})")
        lines += [f"  row {problem.row}: {problem.answer!r:.80}" for problem in unpaid[:SHOWN_ROWS]]
        if len(unpaid) > SHOWN_ROWS:
            lines.append(f"  and {len(unpaid) - SHOWN_ROWS} more")
    print("\n".join(lines))
    return not ranking.violations and not unpaid


def find_problems(config: CheckRewardsConfig) -> tuple[Task, str, list[Problem]]:
    """Return the task, why it is that one, and the problems of the dataset, if one is given."""
    asked = choose_by_flags(config)
    if config.dataset is None:
        task = asked or NUMBER_TASK
        task.check()
        return task, "asked for by --task" if asked else "no --dataset is given", []
    columns = (config.question_column, config.answer_column)
    reading = read_problems(config.dataset, "train", *columns, task=asked)
    return reading.task, reading.why_task, reading.problems


def print_scores(rewards: list[Reward], ranking: Ranking) -> None:
    """Print the table of scores, one row per completion."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("completion", min_width=20, overflow="fold")
    table.add_column("gold", no_wrap=True)
    table.add_column("standing", no_wrap=True)
    for reward in rewards:
        header = f"{reward.name}\nx {reward.weight:g}".replace("_", "_\n")
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    names = [*(reward.name for reward in rewards), "total"]
    for case, values in ranking.scores:
        cells = [f"{values[name]:.3g}" if name in values else "-" for name in names]
        table.add_row(case.name, case.answer, case.standing, *cells)
    make_console().print(table)


def ranking_lines(ranking: Ranking, task: Task) -> list[str]:
    if not task.reads_tags:
        return ["ranking: not checked, the task reads more than the answer tags"]
    if not ranking.rules:
        return ["ranking: not checked, the rewards include no `correctness`"]
    verdict = f"{len(ranking.violations)} violations" if ranking.violations else "right"
    lines = [f"rule checked: {rule}" for rule in ranking.rules]
    lines.append(f"ranking: {verdict} ({len(ranking.scores)} completions)")
    lines += [f"  {violation}" for violation in ranking.violations]
    if ranking.remarks:
        more = f"with your own rewards {len(ranking.remarks)} more"
        lines.append(f"{more}, which may be what they are for:")
    return [*lines, *(f"  {remark}" for remark in ranking.remarks[:SHOWN_ROWS])]
