"""Everything that can go wrong with the data, found before any weights load: splits, gold answers,
overlap, length.

A configuration, a tokenizer and rewards go in; the problems to train, choose and test on come out,
with a sentence for each thing that was left out.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_grpo.config import DecimalSeparator, TrainConfig
from lora_grpo.dataset import Problem, Reading, read_problems
from lora_grpo.gold import describe_unreadable
from lora_grpo.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    fit_style,
    read_system_prompt,
    render,
)
from lora_grpo.rewards import Reward, check_columns, check_gold
from lora_grpo.splits import list_splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 10
NAMED_ROWS = 5
SHOWN_GOLDS = 3
# Validation by default: a standard error of 6 points with the fewest items, 3 with the most, and
# between them an eighth of the completions that are sampled until the next validation.
FEWEST_ITEMS, MOST_ITEMS, VALIDATION_SHARE = 64, 256, 8


@dataclass(frozen=True)
class Data:
    """Problems by use, no question in two of them, and what stands around each question."""

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

    def columns_sha256(self) -> str:
        """Return the hash of every column of the training rows, which only own rewards read."""
        rows = [problem.columns for problem in self.train]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=repr).encode()).hexdigest()

    def sha256(self) -> str:
        """Return the hash of every problem that the run uses, split by split."""
        rows = [
            [problem.as_record() for problem in part]
            for part in (self.train, self.validation, self.test)
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def normalise(question: str) -> str:
    """Return a question as it is compared: letter case and white space do not tell two apart."""
    return re.sub(r"\s+", " ", question).strip().lower()


def describe_rows(rows: Sequence[int]) -> str:
    """Name the first few rows."""
    more = len(rows) - NAMED_ROWS
    named = ", ".join(map(str, rows[:NAMED_ROWS])) + (f" and {more} more" if more > 0 else "")
    return f"row{'s' if len(rows) > 1 else ''} {named}"


class Sieve:
    """Drops problems and keeps a sentence for each kind that it dropped; a strict one stops
    instead."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.notes: list[str] = []

    def drop(self, name: str, problems: list[Problem], rows: list[int], why: str) -> list[Problem]:
        """Return the problems less those of the given rows, of which some may be gone already.

        Raises:
            ValueError: there are such rows and the sieve is strict, or nothing is left.
        """
        if not rows:
            return problems
        total = len({problem.row for problem in problems}.union(rows))
        found = f"{name}: {len(rows)} of {total} {why} ({describe_rows(rows)})"
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
    """Return the problems of a split less those that are blank or cannot earn full marks.

    Raises:
        ValueError: none is left, or the sieve is strict.
    """
    sieve.notes += [note for note in reading.notes if note not in sieve.notes]
    lacking = "rows lack a question or an answer"
    problems = sieve.drop(name, reading.problems, reading.blank, lacking)
    return drop_bad_gold(sieve, name, problems, rewards, reading.dataset)


def find_test(config: TrainConfig, trained_on: str) -> str | None:
    """Return the dataset whose test split is held out, or None where there is none but the split
    that is trained on."""
    if config.eval_dataset is not None:
        return config.eval_dataset
    held_out = {"test", "validation"} & set(list_splits(config.dataset)) - {trained_on}
    return config.dataset if held_out else None


def drop_bad_gold(
    sieve: Sieve, name: str, problems: list[Problem], rewards: Sequence[Reward], dataset: str
) -> list[Problem]:
    """Drop problems whose gold answer the reward would not pay in full; `dataset` is what an error
    begins with."""
    failing = check_gold(
        [problem.answer for problem in problems],
        list(rewards),
        **check_columns(problems),
    )
    bad = [problems[position] for position in failing]
    if len(bad) == len(problems):
        raise ValueError(f"{dataset}: {explain_golds(bad)}")
    shown = f", such as {bad[0].answer!r:.40}" if bad else ""
    why = f"gold answers do not earn full marks against themselves{shown}"
    return sieve.drop(name, problems, [problem.row for problem in bad], why)


def explain_golds(problems: Sequence[Problem]) -> str:
    """Say what gold answers look like of which none can be paid, and what to change."""
    shown = "; ".join(
        f"row {problem.row}: {problem.answer[:40]!r} from {problem.source[-60:]!r}"
        for problem in problems[:SHOWN_GOLDS]
    )
    what = describe_unreadable([problem.answer for problem in problems])
    return (
        f"none of the {len(problems)} gold answers earns full marks: they {what}, and the built-in "
        f"rewards pay numbers only ({shown}): name another column by --answer-column, give the "
        "number itself as the answer, or pay them by a reward of your own with --reward-set none "
        "--reward file.py:function"
    )


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
    """Split off `count` problems drawn by the seed: what is left, and they; repeats of a question
    stay together."""
    order = list(dict.fromkeys(normalise(problem.question) for problem in problems))
    chosen = set(random.Random(seed).sample(order, min(count, len(order))))
    kept = [problem for problem in problems if normalise(problem.question) not in chosen]
    return kept, [problem for problem in problems if normalise(problem.question) in chosen]


def take_example(train: list[Problem], wanted: bool) -> tuple[list[Problem], Problem | None]:
    """Set the first problem with a worked solution apart as the example, where one is wanted;
    repeats of its question go too."""
    if not wanted:
        return train, None
    example = next((problem for problem in train if problem.solution), None)
    if example is None:
        raise ValueError(
            "--one-shot needs a training row with a worked solution before ####, found none: leave "
            "it out"
        )
    question = normalise(example.question)
    return [problem for problem in train if normalise(problem.question) != question], example


def prepare_data(
    config: TrainConfig, tokenizer: "PreTrainedTokenizerBase", rewards: Sequence[Reward]
) -> Data:
    """Load, check and split the problems of a run.

    Raises:
        FileNotFoundError, ValueError: no data, broken data, too little of it, or doubtful rows with
        --strict-data.
    """
    sieve = Sieve(config.strict_data)
    style = fit_style(tokenizer, PromptStyle(read_system_prompt(config.system_prompt_file)))
    reading = read_data(config, config.dataset, "train", config.decimal_separator)
    train = keep_usable(sieve, "train", reading, rewards)
    test_name = find_test(config, reading.split)
    if test_name is not None:
        same = test_name == config.dataset
        separator = reading.decimal_separator if same else config.decimal_separator
        test_reading = read_data(config, test_name, "test", separator)
        test, test_split = keep_usable(sieve, "test", test_reading, rewards), test_reading.split
        train = drop_overlap(sieve, train, test)
    else:
        count = config.num_eval_items or max(1, num_questions(train) // HELD_OUT_SHARE)
        train, test = hold_out(train, count, config.seed)
        test_name = config.dataset
        test_split = f"held out of {reading.split} with seed {config.seed}"
    train, example = take_example(train, config.one_shot)
    style = replace(style, example=example)
    limits = (style, tokenizer, config.max_prompt_length)
    train, longest = drop_long(sieve, "train", train, *limits)
    test = drop_long(sieve, "test", test, *limits)[0][: config.num_eval_items]
    count = count_validation_items(config, num_questions(train))
    train, validation = hold_out(train, count, config.seed)
    check_enough(config, train, validation, sieve.notes)
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
    )


def read_data(
    config: TrainConfig, dataset: str, split: str, decimal_separator: DecimalSeparator
) -> Reading:
    columns = (config.question_column, config.answer_column)
    flag = "--eval-dataset" if dataset == config.eval_dataset else "--dataset"
    return read_problems(dataset, split, *columns, flag, decimal_separator)


def num_questions(problems: Sequence[Problem]) -> int:
    """Return how many different questions there are: some datasets repeat each a hundred times."""
    return len({normalise(problem.question) for problem in problems})


def count_validation_items(config: TrainConfig, num_problems: int) -> int:
    """Return how many problems choose the best step: as asked for, else a tenth of them, within
    what costs little beside the sampling."""
    if config.num_validation_items is not None:
        return config.num_validation_items
    cheap = config.eval_steps * config.completions_per_step // VALIDATION_SHARE
    return min(num_problems // HELD_OUT_SHARE, max(FEWEST_ITEMS, min(MOST_ITEMS, cheap)))


def describe_sizes(
    config: TrainConfig, train: Sequence[Problem], test: Sequence[Problem]
) -> list[str]:
    """Return a note where there are fewer problems than were asked for."""
    notes = []
    if config.num_eval_items is not None and len(test) < config.num_eval_items:
        notes.append(f"--num-eval-items {config.num_eval_items}: the test has only {len(test)}")
    if len(train) < config.prompts_per_step:
        notes.append(
            f"a step takes {config.prompts_per_step} prompts of {len(train)} problems: each comes "
            "up more than once in it"
        )
    return notes


def check_enough(
    config: TrainConfig,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    notes: Sequence[str],
) -> None:
    """Refuse a dataset of which nothing is left to train on, and say where its rows went."""
    if not train:
        went = [*notes, f"{len(validation)} kept to choose the best step"]
        raise ValueError(
            f"--dataset {config.dataset} leaves no problems to train on: give more rows, or lower "
            f"--num-eval-items or --num-validation-items ({'; '.join(went)})"
        )
