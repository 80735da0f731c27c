"""Check rewards before training: rank the corpus, and run a dataset's gold answers through them.

A `CheckRewardsConfig` goes in; a `RewardCheck` with everything that is wrong comes out, and
`print_check` shows it as a table.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lora_grpo.rewards.builtin import (
    Reward,
    build_rewards,
    check_columns,
    check_gold,
    parse_reward_weights,
    reward_columns,
)
from lora_grpo.rewards.corpus import Ranking, rank
from lora_grpo.rewards.custom import RewardError

if TYPE_CHECKING:
    from lora_grpo.data.problems import Problem

SHOWN_ROWS = 10
WIDTH_IN_A_FILE = 120


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

    def __post_init__(self) -> None:
        if self.reward_set == "none" and not self.reward:
            raise ValueError("--reward-set none leaves no reward: add --reward file.py:function")
        if self.dataset is None and (self.question_column or self.answer_column):
            raise ValueError("--question-column and --answer-column need --dataset FILE")
        parse_reward_weights(self.reward_weight)


@dataclass(frozen=True)
class GoldCheck:
    """How many gold answers were run through `correctness`, and the problems that it rejects."""

    num_problems: int
    failures: list["Problem"]


@dataclass(frozen=True)
class RewardCheck:
    """What a check found; `gold` is None where there was no dataset or no `correctness`."""

    rewards: list[Reward]
    ranking: Ranking
    gold: GoldCheck | None
    dataset: str | None

    @property
    def passed(self) -> bool:
        return not self.ranking.violations and not (self.gold and self.gold.failures)


def check_rewards(config: CheckRewardsConfig) -> RewardCheck:
    """Build the rewards, rank the corpus and check the dataset's gold answers.

    Raises:
        FileNotFoundError: the dataset or a reward's file is not there.
        ValueError: a flag, a reward or the data cannot be used.
    """
    try:
        return run_checks(config)
    except RewardError as error:
        raise ValueError(str(error)) from error


def run_checks(config: CheckRewardsConfig) -> RewardCheck:
    weights = parse_reward_weights(config.reward_weight)
    rewards = build_rewards(config.reward_set, config.reward, weights)
    problems = load(config)
    row = next(iter(reward_columns(problems[:1]).values()), {})
    columns = {name: row[name] for name in row.keys() - {"question", "answer"}}
    ranking = rank(rewards, config.reward_set, columns)
    return RewardCheck(rewards, ranking, check_dataset(problems, rewards), config.dataset)


def load(config: CheckRewardsConfig) -> list["Problem"]:
    if config.dataset is None:
        return []
    from lora_grpo.data.problems import load_problems

    return load_problems(
        config.dataset,
        question_column=config.question_column,
        answer_column=config.answer_column,
    )


def check_dataset(problems: list["Problem"], rewards: list[Reward]) -> GoldCheck | None:
    if not problems or all(reward.name != "correctness" for reward in rewards):
        return None
    answers = [problem.answer for problem in problems]
    failing = check_gold(answers, rewards, **check_columns(problems))
    return GoldCheck(len(problems), [problems[index] for index in failing])


def print_check(check: RewardCheck) -> None:
    """Print the table of scores, then each rule that was checked and what broke it."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_IN_A_FILE)
    console.print(build_table(check))
    for line in [*ranking_lines(check.ranking), *gold_lines(check)]:
        print(line)


def build_table(check: RewardCheck) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("completion", min_width=20, overflow="fold")
    table.add_column("gold", no_wrap=True)
    table.add_column("standing", no_wrap=True)
    for reward in check.rewards:
        header = f"{reward.name}\nx {reward.weight:g}".replace("_", "_\n")
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    names = [*(reward.name for reward in check.rewards), "total"]
    for case, values in check.ranking.scores:
        cells = [f"{values[name]:.3g}" if name in values else "-" for name in names]
        table.add_row(case.name, case.answer, case.standing, *cells)
    return table


def ranking_lines(ranking: Ranking) -> list[str]:
    if not ranking.rules:
        return ["ranking: not checked, the rewards include no `correctness`"]
    verdict = f"{len(ranking.violations)} violations" if ranking.violations else "right"
    return [
        *(f"rule checked: {rule}" for rule in ranking.rules),
        f"ranking: {verdict} ({len(ranking.scores)} completions)",
        *(f"  {violation}" for violation in ranking.violations),
        *(
            [f"with your own rewards {len(ranking.remarks)} more, which may be what they are for:"]
            if ranking.remarks
            else []
        ),
        *(f"  {remark}" for remark in ranking.remarks[:SHOWN_ROWS]),
    ]


def gold_lines(check: RewardCheck) -> list[str]:
    if check.dataset is None:
        return []
    if check.gold is None:
        return ["gold answers: not checked, the rewards include no `correctness`"]
    failures, total = check.gold.failures, check.gold.num_problems
    lines = [f"gold answers: {total - len(failures)} of {total} score full marks ({check.dataset})"]
    lines += [f"  row {problem.row}: {problem.answer!r:.80}" for problem in failures[:SHOWN_ROWS]]
    if len(failures) > SHOWN_ROWS:
        lines.append(f"  and {len(failures) - SHOWN_ROWS} more")
    return lines
