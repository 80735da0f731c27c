"""The problems of a run: read, checked and split before any weights load.

Rows with bad gold answers, questions of the test set and long prompts are dropped, with a note for
each kind.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.gold import DecimalSeparator
from lora_grpo.data.problems import Problem, Reading, normalise, read_problems, take_example
from lora_grpo.data.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    fit_style,
    read_system_prompt,
    render,
)
from lora_grpo.data.sources import list_splits
from lora_grpo.rewards.builtin import Reward
from lora_grpo.rewards.own_task import choose_by_flags
from lora_grpo.rewards.usable import Sieve, check_prompt, keep_usable
from lora_grpo.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 10
SHOWN_GOLDS = 3
# Default size of the validation set: an eighth of the completions that are sampled until the next
# validation, within these limits. Their standard errors are 6 and 3 points.
FEWEST_ITEMS, MOST_ITEMS, VALIDATION_SHARE = 64, 256, 8


@dataclass(frozen=True)
class Data:
    """The problems by their use, no question in two of them, and the prompts' style."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    test_name: str
    test_split: str
    num_validation_items: int
    decimal_separator: DecimalSeparator
    style: PromptStyle
    notes: tuple[str, ...]
    longest_prompt: int
    why_task: str = ""

    def columns_sha256(self) -> str:
        """Return the hash of all columns of the training rows; only a user's rewards read them."""
        rows = [problem.columns for problem in self.train]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=repr).encode()).hexdigest()

    def sha256(self) -> str:
        """Return the hash of every problem that the run uses."""
        rows = [
            [problem.as_record() for problem in part]
            for part in (self.train, self.validation, self.test)
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def find_test(config: TrainConfig, trained_on: str) -> str | None:
    """Return the dataset with the test split, or None if there is only the split that is trained
    on."""
    if config.eval_dataset is not None:
        return config.eval_dataset
    held_out = {"test", "validation"} & set(list_splits(config.dataset)) - {trained_on}
    return config.dataset if held_out else None


def drop_long(
    sieve: Sieve,
    name: str,
    problems: list[Problem],
    style: PromptStyle,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int,
) -> tuple[list[Problem], int]:
    """Drop problems whose prompt is longer than the limit; return the rest, and their longest."""
    prompts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    lengths = count_tokens(tokenizer, prompts)
    pairs = zip(problems, lengths, strict=True)
    long = [problem.row for problem, length in pairs if length > limit]
    longest = max(lengths, default=0)
    why = f"prompts are longer than --max-prompt-length {limit} (the longest has {longest})"
    kept = max((length for length in lengths if length <= limit), default=0)
    return sieve.drop(name, problems, long, why), kept


def drop_overlap(sieve: Sieve, train: list[Problem], test: Sequence[Problem]) -> list[Problem]:
    """Drop training problems whose question is also a test question."""
    held_out = {normalise(problem.question) for problem in test}
    bad = [problem.row for problem in train if normalise(problem.question) in held_out]
    return sieve.drop("train", train, bad, "questions are also in the test set")


def hold_out(problems: list[Problem], count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return the problems without, and with only, the `count` questions that the seed draws."""
    order = list(dict.fromkeys(normalise(problem.question) for problem in problems))
    chosen = set(random.Random(seed).sample(order, min(count, len(order))))
    kept = [problem for problem in problems if normalise(problem.question) not in chosen]
    return kept, [problem for problem in problems if normalise(problem.question) in chosen]


def read_training_data(config: TrainConfig) -> Reading:
    """Read the training split, with the task that is asked for or that its gold answers show.

    Raises:
        FileNotFoundError, ValueError: the data are missing or broken.
    """
    separator, task = config.decimal_separator, choose_by_flags(config)
    return read_data(config, config.dataset, "train", separator, task)


def prepare_data(
    config: TrainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    rewards: Sequence[Reward],
    reading: Reading | None = None,
) -> Data:
    """Check and split the problems of a run; `reading` is the training split, if read already.

    Raises:
        FileNotFoundError, ValueError: the data are missing, broken or too few, or rows would be
        dropped with --strict-data.
    """
    sieve = Sieve(config.strict_data)
    reading = reading or read_training_data(config)
    style = read_style(config, tokenizer, rewards, sieve, reading.task)
    train = keep_usable(sieve, "train", reading, rewards)
    test_name = find_test(config, reading.split)
    if test_name is not None:
        same = test_name == config.dataset
        separator = reading.decimal_separator if same else config.decimal_separator
        test_reading = read_data(config, test_name, "test", separator, reading.task)
        test, test_split = keep_usable(sieve, "test", test_reading, rewards), test_reading.split
        train = drop_overlap(sieve, train, test)
    else:
        count = config.num_eval_items or max(1, num_questions(train) // HELD_OUT_SHARE)
        train, test = hold_out(train, count, config.seed)
        test_name = config.dataset
        test_split = f"held out of {reading.split} with seed {config.seed}"
    train, example = take_example(train, config.one_shot)
    style = replace(style, example=example)
    if example and not example.solution:
        sieve.notes.append(
            "--one-shot: no row has a worked solution before ####, so the example's reasoning is "
            "its answer alone"
        )
    limits = (style, tokenizer, config.max_prompt_length)
    train, longest = drop_long(sieve, "train", train, *limits)
    test = drop_long(sieve, "test", test, *limits)[0][: config.num_eval_items]
    count = count_validation_items(config, num_questions(train))
    train, validation = hold_out(train, count, config.seed)
    check_enough(config, train, validation, sieve.notes)
    if config.stop_at_accuracy is not None and not validation:
        raise ValueError(
            f"--stop-at-accuracy {config.stop_at_accuracy:g}: {num_questions(train)} questions are "
            "too few to hold a tenth out for validation: give --num-validation-items, or use "
            "--max-minutes"
        )
    return Data(
        train=train,
        validation=validation,
        test=test,
        test_name=test_name,
        test_split=test_split,
        num_validation_items=count,
        decimal_separator=reading.decimal_separator,
        style=style,
        notes=(*sieve.notes, *describe_sizes(config, train, test)),
        longest_prompt=longest,
        why_task=describe_task(reading, train),
    )


def describe_task(reading: Reading, train: Sequence[Problem]) -> str:
    """Return the task with the reason for it, and three gold answers as it reads them."""
    shown = ", ".join(f"{problem.answer!r:.40}" for problem in train[:SHOWN_GOLDS])
    return f"{reading.task.name} ({reading.why_task}), such as {shown}"


def read_style(
    config: TrainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    rewards: Sequence[Reward],
    sieve: Sieve,
    task: Task,
) -> PromptStyle:
    """Return the style of the prompts, after checking the user's system prompt, if any."""
    path = config.system_prompt_file
    style = PromptStyle(read_system_prompt(path, task), task=task)
    if path is not None and config.resume is None:
        sieve.notes += check_prompt(path, style.system_prompt, rewards, task, config.one_shot)
    return fit_style(tokenizer, style)


def read_data(
    config: TrainConfig,
    dataset: str,
    split: str,
    decimal_separator: DecimalSeparator,
    task: Task | None,
) -> Reading:
    columns = (config.question_column, config.answer_column)
    flag = "--eval-dataset" if dataset == config.eval_dataset else "--dataset"
    return read_problems(dataset, split, *columns, flag, decimal_separator, task)


def num_questions(problems: Sequence[Problem]) -> int:
    """Return the number of different questions: some datasets repeat each a hundred times."""
    return len({normalise(problem.question) for problem in problems})


def count_validation_items(config: TrainConfig, num_problems: int) -> int:
    """Return the size of the validation set: as asked for, else a tenth of the problems, limited so
    that it costs little compared with the sampling."""
    if config.num_validation_items is not None:
        return config.num_validation_items
    cheap = config.eval_steps * config.completions_per_step // VALIDATION_SHARE
    return min(num_problems // HELD_OUT_SHARE, max(FEWEST_ITEMS, min(MOST_ITEMS, cheap)))


def describe_sizes(
    config: TrainConfig, train: Sequence[Problem], test: Sequence[Problem]
) -> list[str]:
    """Return notes about having fewer problems than were asked for."""
    notes = []
    if config.num_eval_items is not None and len(test) < config.num_eval_items:
        notes.append(f"--num-eval-items {config.num_eval_items}: the test has only {len(test)}")
    if len(train) < config.prompts_per_step:
        notes.append(
            f"a step takes {config.prompts_per_step} prompts of {len(train)} problems: some repeat"
        )
    return notes


def check_enough(
    config: TrainConfig,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    notes: Sequence[str],
) -> None:
    """Raise a ValueError if no problem is left to train on; it says where the rows went."""
    if not train:
        went = [*notes, f"{len(validation)} kept to choose the best step"]
        raise ValueError(
            f"--dataset {config.dataset} leaves no problems to train on: give more rows, or lower "
            f"--num-eval-items or --num-validation-items ({'; '.join(went)})"
        )
