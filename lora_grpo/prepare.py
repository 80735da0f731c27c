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
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.config import TrainConfig
from lora_grpo.dataset import BUILT_IN, Problem, read_problems
from lora_grpo.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    fit_style,
    read_system_prompt,
    render,
)
from lora_grpo.rewards import Reward, check_columns, check_gold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 10
NAMED_ROWS = 5


@dataclass(frozen=True)
class Data:
    """Problems by use, no question in two of them, and what stands around each question."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    test_name: str
    test_split: str
    style: PromptStyle
    notes: tuple[str, ...]
    longest_prompt: int

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


def load_checked(
    sieve: Sieve, config: TrainConfig, rewards: Sequence[Reward], split: str, dataset: str
) -> list[Problem]:
    """Return the problems of a split less those that are blank or cannot earn full marks."""
    columns = (config.question_column, config.answer_column)
    flag = "--eval-dataset" if dataset == config.eval_dataset else "--dataset"
    problems, blank = read_problems(dataset, split, *columns, flag)
    problems = sieve.drop(split, problems, blank, "rows lack a question or an answer")
    return drop_bad_gold(sieve, split, problems, rewards)


def find_test(config: TrainConfig) -> str | None:
    """Return the dataset whose test split is held out, or None where a single file is all there
    is."""
    if config.eval_dataset is not None:
        return config.eval_dataset
    single = config.dataset != BUILT_IN and Path(config.dataset).expanduser().is_file()
    return None if single else config.dataset


def drop_bad_gold(
    sieve: Sieve, name: str, problems: list[Problem], rewards: Sequence[Reward]
) -> list[Problem]:
    """Drop problems whose gold answer the reward would not pay in full."""
    failing = check_gold(
        [problem.answer for problem in problems],
        list(rewards),
        **check_columns(problems),
    )
    bad = [problems[position] for position in failing]
    shown = f", such as {bad[0].answer!r:.40}" if bad else ""
    why = f"gold answers do not earn full marks against themselves{shown}"
    return sieve.drop(name, problems, [problem.row for problem in bad], why)


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
    train = load_checked(sieve, config, rewards, "train", config.dataset)
    test_name = find_test(config)
    if test_name is not None:
        test, test_split = load_checked(sieve, config, rewards, "test", test_name), "test"
        train = drop_overlap(sieve, train, test)
    else:
        count = config.num_eval_items or len(train) // HELD_OUT_SHARE
        train, test = hold_out(train, count, config.seed)
        test_name, test_split = config.dataset, f"held out of train with seed {config.seed}"
    train, example = take_example(train, config.one_shot)
    style = replace(style, example=example)
    limits = (style, tokenizer, config.max_prompt_length)
    train, longest = drop_long(sieve, "train", train, *limits)
    test = drop_long(sieve, "test", test, *limits)[0][: config.num_eval_items]
    train, validation = hold_out(train, config.num_validation_items, config.seed)
    check_enough(config, train, validation, test, sieve.notes)
    notes = tuple(sieve.notes)
    return Data(train, validation, test, test_name, test_split, style, notes, longest)


def check_enough(
    config: TrainConfig,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    test: Sequence[Problem],
    notes: Sequence[str],
) -> None:
    """Refuse a dataset that cannot fill one step or has nothing to test on, and say where its
    rows went."""
    if len(train) < config.prompts_per_step:
        went = [*notes, f"{len(validation)} kept to choose the best step"]
        raise ValueError(
            f"--dataset {config.dataset} leaves {len(train)} problems to train on, a step takes "
            f"{config.prompts_per_step}: give more rows, or lower --num-validation-items or the "
            f"batch ({'; '.join(went)})"
        )
    if not test:
        raise ValueError(
            f"--dataset {config.dataset} leaves nothing to evaluate on: name one by --eval-dataset"
        )
