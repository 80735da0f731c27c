"""Rewards for GRPO: two built-in sets and the user's own, each a plain function with a weight.

Completions and gold answers go in, in TRL's signature; one unweighted value per completion comes
out. The `Task` that reads a completion here also reads it in evaluation, so training pays for what
is measured.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import build_messages
from lora_grpo.rewards.calls import Calls, Completion, RewardError, to_texts
from lora_grpo.rewards.custom import load_custom_reward, parse_weight
from lora_grpo.tasks.numbers import parse_number
from lora_grpo.tasks.task import NUMBER_TASK, Task

RewardFunction = Callable[..., list[float | None]]

# What TRL passes to a reward by these names is its own: a dataset's column of that name stays out.
NAMES_OF_TRL = frozenset(
    {
        *("prompt", "prompts", "completion", "completions", "completion_ids"),
        *("trainer_state", "log_extra", "log_metric", "environments"),
    }
)


@dataclass(frozen=True)
class Reward:
    """A reward: `function` returns unweighted values, `weight` is what each counts in the sum;
    `sha256` is that of the user's file, None for a built-in one."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    sha256: str | None = None

    @property
    def left_out(self) -> dict[int, str]:
        """Why completions of the last call got no score, by position; only of a user's own."""
        return getattr(self.function, "left_out", {})


def by_text(name: str, value: Callable[[str], float], weight: float) -> Reward:
    """Return the reward that pays each completion by its text alone."""

    def function(completions: list[Completion], **columns: Any) -> list[float]:
        return [float(value(text)) for text in to_texts(completions)]

    function.__name__ = name  # by which TRL logs it
    return Reward(name, function, weight)


def build_correctness(task: Task) -> RewardFunction:
    """Return the reward of 1 where the text between the answer tags equals the gold answer."""

    def correctness(
        completions: list[Completion], answer: list[str], **columns: Any
    ) -> list[float]:
        rows = unzip(columns, len(answer))
        judged = zip(to_texts(completions), answer, rows, strict=True)
        return [task.score(text, gold, {**row, "answer": gold}) for text, gold, row in judged]

    return correctness


def unzip(columns: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Return one row per completion of what a trainer passes by column; what is no column of the
    batch, such as TRL's `trainer_state`, is left out."""
    by_row = {
        name: values
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == count
    }
    return [{name: values[index] for name, values in by_row.items()} for index in range(count)]


def build_length_penalty(max_completion_length: int | None) -> RewardFunction:
    """Return the soft overlong punishment of DAPO (arXiv 2503.14476), a fifth of the limit wide:
    0 up to four fifths of the limit in tokens, then linearly less, -1 at the limit.

    It is 0 where the limit or the token ids are not known.
    """

    def length_penalty(
        completions: list[Completion],
        completion_ids: list[list[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        if max_completion_length is None or completion_ids is None:
            return [0.0] * len(completions)
        limit = max_completion_length
        return [min(max((4 * limit - 5 * len(ids)) / limit, -1.0), 0.0) for ids in completion_ids]

    return length_penalty


def is_integer(text: str) -> bool:
    """Return whether a text is a whole number without a unit; a sign, `,` and `$` are free."""
    bare = text.replace(",", "").replace("$", "").lstrip("+-\u2212")
    return bare.isascii() and bare.isdigit() and parse_number(text) is not None


def has_layout(task: Task, text: str) -> bool:
    """Return whether a completion is laid out as the prompt shows it, each tag on its own line."""
    _, closed, opened, _ = task.tags
    framed = text.startswith(f"{task.tags[0]}\n") and text.endswith(f"\n{task.tags[3]}")
    return framed and f"\n{closed}\n{opened}\n" in text and task.has_format(text)


def count_tags(task: Task, text: str) -> int:
    """Return how many of the four tags are there exactly once, with their line breaks."""
    first, *inner, last = task.tags
    lines = [f"{first}\n", *(f"\n{tag}\n" for tag in inner), f"\n{last}"]
    return sum(text.count(line.strip()) == 1 and line in text for line in lines)


def build_default(task: Task, max_completion_length: int | None) -> list[Reward]:
    """Return what is paid by default; nothing for an answer without tags."""
    return [
        Reward("correctness", build_correctness(task), 1.0),
        by_text("format", task.has_format, 0.2),
        Reward("length_penalty", build_length_penalty(max_completion_length), 0.2),
    ]


def build_classic(task: Task) -> list[Reward]:
    """Return the five rewards of the widespread GSM8K recipe, its known flaws mended."""
    return [
        Reward("correctness", build_correctness(task), 2.0),
        by_text("integer", lambda text: is_integer(task.parse(text) or ""), 0.5),
        by_text("strict_format", lambda text: has_layout(task, text.strip()), 0.5),
        by_text("soft_format", task.has_format, 0.5),
        by_text("xml_count", lambda text: count_tags(task, text.strip()) / 4, 0.5),
    ]


def build_rewards(
    reward_set: str = "default",
    custom: tuple[str, ...] = (),
    weights: dict[str, float] | None = None,
    max_completion_length: int | None = None,
    task: Task = NUMBER_TASK,
    calls: Calls = Calls(),  # noqa: B008 - frozen
) -> list[Reward]:
    """Return the rewards of a set, then the user's own, with the weights by name put in.

    Each of `custom` is `path/to/file.py:function=0.5`, called as `calls` says;
    `max_completion_length` is in tokens.

    Raises:
        FileNotFoundError: a custom reward's file is not there.
        ValueError: an unknown set, a custom reward that cannot be used, a name twice, a weight for
            an unknown name, or no reward at all.
    """
    sets = {
        "default": build_default(task, max_completion_length),
        "classic": build_classic(task),
        "none": [],
    }
    if reward_set not in sets:
        raise ValueError(f"--reward-set must be one of {', '.join(sets)}, got {reward_set!r}")
    rewards = [*sets[reward_set], *(Reward(*load_custom_reward(spec, calls)) for spec in custom)]
    names = [reward.name for reward in rewards]
    if not names:
        raise ValueError(
            "--reward-set none leaves no reward: add one with --reward file.py:function"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"--reward gives the name {twice[0]!r} twice: rename one function")
    weights = weights or {}
    for name in weights:
        if name not in names:
            raise ValueError(f"--reward-weight must name one of {', '.join(names)}, got {name!r}")
    return [replace(reward, weight=weights.get(reward.name, reward.weight)) for reward in rewards]


def parse_reward_weights(pairs: tuple[str, ...]) -> dict[str, float]:
    """Return the weights by name of `--reward-weight name=value` flags.

    Raises:
        ValueError: a pair has no name or no finite number.
    """
    weights = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"--reward-weight must look like name=0.5, got {pair!r}")
        weights[name] = parse_weight("--reward-weight", value, pair)
    return weights


def score_with(
    rewards: list[Reward], completion: str, answer: str, /, **columns: Any
) -> dict[str, float]:
    """Return each reward's weighted score of one completion by name, and their sum as `total`.

    `columns` holds this completion's own values (`prompts`, `completion_ids`, the dataset's
    columns). A reward that says None does not apply, and is left out.
    """
    batch = {name: [value] for name, value in columns.items()}
    scores = {}
    for reward in rewards:
        [value] = reward.function(completions=[completion], answer=[answer], **batch)
        if value is not None:
            scores[reward.name] = reward.weight * value
    return {**scores, "total": sum(scores.values(), start=0.0)}


def score(completion: str, answer: str, reward_set: str = "default") -> dict[str, float]:
    """Return the weighted scores of a built-in set by name, and their sum as `total`."""
    return score_with(build_rewards(reward_set), completion, answer)


def reward_columns(problems: Sequence[Problem]) -> dict[int, dict[str, Any]]:
    """Return what a reward gets with each problem, by row number: `question`, `answer` (the gold
    answer alone), and every other column of the dataset as it was read, None where a row lacks it.
    """
    names = {name for problem in problems for name in problem.columns} - NAMES_OF_TRL
    return {
        problem.row: {
            **{name: problem.columns.get(name) for name in sorted(names)},
            "question": problem.question,
            "answer": problem.answer,
        }
        for problem in problems
    }


def try_rewards(
    rewards: Sequence[Reward], problems: Sequence[Problem], task: Task = NUMBER_TASK, **passed: Any
) -> None:
    """Call each reward once as training will: made-up completions of the first problem.

    `passed` is what else the trainer gives: `trainer_state`, `log_extra`, `log_metric`.

    Raises:
        RewardError, ValueError: a mistake in a user's own function.
    """
    columns = next(iter(reward_columns(problems).values()))
    texts = [perfect(columns["answer"], task), "I do not know.", ""]
    batch = {name: [value] * len(texts) for name, value in columns.items()}
    batch["prompts"] = [build_messages(columns["question"]) for _ in texts]
    for reward in rewards:
        reward.function(
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[[0] * len(text) for text in texts],
            **batch,
            **passed,
        )
    left_out(rewards, len(texts))


def left_out(rewards: Sequence[Reward], total: int) -> tuple[set[int], list[str]]:
    """Return the positions of the completions that a reward of the user's could not score in the
    last call, and a sentence for each such reward.

    Raises:
        RewardError: a reward could score none of the completions, `total` in number.
    """
    rows: set[int] = set()
    notes = []
    for reward in rewards:
        if reward.left_out:
            rows |= reward.left_out.keys()
            reason = next(iter(reward.left_out.values()))
            count = f"reward {reward.name!r} did not score {len(reward.left_out)} of {total}"
            notes.append(f"{count} completions, which are left out of the step: {reason}")
            if len(reward.left_out) == total:
                raise RewardError(
                    f"{count} completions ({reason}), so there is nothing to learn from: see that "
                    "it answers, or raise --reward-timeout; then --resume a run that had begun"
                )
    return rows, notes


def perfect(answer: str, task: Task = NUMBER_TASK) -> str:
    """Return a completion that earns full marks for a readable gold answer."""
    return task.write("I work it out.", task.write_gold(answer))


def check_gold(
    answers: list[str], rewards: Sequence[Reward], task: Task = NUMBER_TASK, /, **columns: list[Any]
) -> list[int]:
    """Return the positions of gold answers that `correctness` does not pay in full.

    Each is put in a perfect completion; one that fails can never be learned. `columns` holds what
    else the reward needs, one value per answer. Without a reward of that name nothing is checked.
    """
    judge = next((reward for reward in rewards if reward.name == "correctness"), None)
    if judge is None or not task.reads_tags:
        return []
    completions = [perfect(answer, task) for answer in answers]
    values = judge.function(completions=completions, answer=answers, **columns)
    return [index for index, value in enumerate(values) if value is None or value < 1.0]


def find_unpaid(
    problems: Sequence[Problem], rewards: Sequence[Reward], task: Task = NUMBER_TASK
) -> list[Problem]:
    """Return the problems whose gold answer `correctness` does not pay in full; it gets what it
    gets in training."""
    if not problems:
        return []
    rows = list(reward_columns(problems).values())
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["prompts"] = [build_messages(problem.question) for problem in problems]
    unpaid = check_gold(columns.pop("answer"), rewards, task, **columns)
    return [problems[index] for index in unpaid]
