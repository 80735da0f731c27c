"""Evaluate models on held-out problems with the training prompt: one greedy completion per problem,
and on demand several sampled ones."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lora_grpo.config.train_config import Rollout, check_task
from lora_grpo.data.gold import DecimalSeparator
from lora_grpo.data.problems import Problem, read_problems
from lora_grpo.data.prompt import PromptStyle, build_messages, count_tokens, fit_style, render
from lora_grpo.data.sources import BUILT_IN
from lora_grpo.machine.backend import check_4bit, choose_backend, claim
from lora_grpo.machine.files import check_room, read_json, read_jsonl, write_json, write_jsonl
from lora_grpo.machine.hardware import find_gpu
from lora_grpo.policy.adapter import (
    CONFIG,
    EVAL,
    EVAL_ITEMS,
    RunRecord,
    check_adapter,
    read_record,
)
from lora_grpo.policy.base import (
    Placement,
    choose_placement,
    fit_padding,
    is_stored_in_4bit,
    load_tokenizer,
    resolve_model,
)
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.generate import Advance
from lora_grpo.policy.open import Policy, open_policy
from lora_grpo.results.records import lora_rank
from lora_grpo.results.sampled import build_sampled, build_sampled_items
from lora_grpo.results.scoring import (
    Item,
    build_eval_items,
    build_evaluation,
    judge,
    read_item,
)
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.rewards.own_task import choose_by_flags
from lora_grpo.rewards.usable import Sieve, keep_usable
from lora_grpo.tasks.kinds import TaskName
from lora_grpo.tasks.task import NUMBER_TASK, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_grpo.policy.vllm import EngineSettings

ROOM_FOR_ITEMS = 2**24
WHOLE_CARD, MOST_OF_FREE = 0.85, 0.95
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate an adapter against its base, or a model alone, on held-out problems."""

    adapter_dir: tyro.conf.Positional[Path | None] = None
    """An adapter directory: its base and the adapter get the same problems."""
    model: str | None = None
    """A model to evaluate alone; with ADAPTER_DIR, the base to put the adapter on in place of its
    own."""
    dataset: str | None = None
    """Held-out problems; by default those that the adapter was evaluated on, or `arithmetic`."""
    question_column: str | None = None
    """Column of the question, or several joined as body+question; by default a usual name."""
    answer_column: str | None = None
    """Column of the gold answer; by default a usual name, such as answer or solution."""
    task: TaskName = "auto"
    """What an answer is; by default the adapter's own task, or what the gold answers show."""
    task_file: Path | None = None
    """A task of your own, as in train_lora.py: a .py file with parse and same, or a reward."""
    accuracy_threshold: float = 1.0
    """With a --task-file that has only a reward: what a right answer earns of it, at least."""
    decimal_separator: DecimalSeparator = "auto"
    """How gold answers write decimals: auto is comma where they can be read in no other way."""
    num_items: int | None = None
    """Use only this many problems, the first ones; by default all."""
    max_completion_length: int | None = None
    """Longest completion in tokens; by default the length trained with, or 512."""
    load_in_4bit: bool | None = None
    """Hold the base in NF4; by default as it was trained, or not."""
    num_samples: int | None = None
    """Also sample this many completions per problem, for pass@k and maj@k beside greedy."""
    temperature: float | None = None
    """Of the samples; by default the temperature trained with, or 1."""
    seed: int = 0
    """Of the samples: each depends on it and on its problem's position alone."""
    batch_size: int = 32
    """Completions per batch."""
    rollout: Rollout = "auto"
    """What generates: vllm, or transformers' generate; auto is vllm with a GPU, if installed."""
    output: Path | None = None
    """Write eval.json to this file, items and samples beside it; nothing is overwritten."""

    def __post_init__(self) -> None:
        check_task(self.task, self.task_file)
        if self.adapter_dir is None and self.model is None:
            raise ValueError("give an adapter directory such as adapters/tiny, or --model")
        for name in ("num_items", "max_completion_length", "batch_size", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        self._check_samples()
        for path in (self.output, self.beside("items"), self.beside("samples")):
            if path is not None and path.exists():
                raise ValueError(
                    f"--output {self.output}: {path} exists already: choose another name or move it"
                )

    def _check_samples(self) -> None:
        if self.temperature is not None:
            if self.num_samples is None:
                raise ValueError(
                    f"--temperature {self.temperature:g} is for samples: add --num-samples 8"
                )
            if not 0 < self.temperature < math.inf:
                raise ValueError(
                    f"--temperature must be greater than 0, got {self.temperature:g}: greedy "
                    "decoding is always evaluated too"
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {self.seed}")

    def beside(self, what: str) -> Path | None:
        """Return the file beside the output that holds its items or samples."""
        return self.output and self.output.with_name(f"{self.output.stem}_{what}.jsonl")


def evaluate_model(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    style: PromptStyle,
    max_completion_length: int,
    advance: Advance = lambda count: None,
    sampling: Sampling | None = None,
) -> list[Item]:
    """Generate one greedy completion per problem, or several sampled ones, and score them, in the
    problems' order."""
    prompts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    completions = [
        replace(done, text=style.prefill + done.text)
        for done in policy.complete(prompts, max_completion_length, advance, sampling)
    ]
    each = sampling.num_samples if sampling else 1
    return [judge(problems[row // each], done, style.task) for row, done in enumerate(completions)]


def held_out_problems(
    config: EvaluateConfig, record: RunRecord
) -> tuple[list[Problem], str, str, list[str], Task]:
    """Return the problems to evaluate on, their dataset's and split's names, notes on how they were
    read and what was dropped, and the task: the run's, or without a record that of the problems.

    Raises:
        FileNotFoundError, ValueError: no data, or none whose gold answer can be paid.
    """
    saved, rows = record.trained, read_jsonl(record.records / EVAL_ITEMS)
    task = choose_by_flags(config) or (record.style.task if saved else None)
    if task is not None:
        task.check()
    if config.dataset is None and rows:
        report = read_json(record.records / EVAL)
        problems = [read_item(row) for row in rows[: config.num_items]]
        return problems, report["dataset"], report["split"], [], task or NUMBER_TASK
    dataset = config.dataset or saved.get("eval_dataset") or saved.get("dataset") or BUILT_IN
    known = saved if dataset in (saved.get("eval_dataset"), saved.get("dataset")) else {}
    separator = config.decimal_separator
    if separator == "auto":
        separator = known.get("decimal_separator", "auto")
    reading = read_problems(
        dataset,
        "test",
        config.question_column or known.get("question_column"),
        config.answer_column or known.get("answer_column"),
        decimal_separator=separator,
        task=task,
    )
    sieve = Sieve(strict=False)
    problems = keep_usable(sieve, reading.split, reading, build_rewards(task=reading.task))
    return problems[: config.num_items], dataset, reading.split, sieve.notes, reading.task


@dataclass(frozen=True)
class Examination:
    """The model, the problems and the prompt of an evaluation, known before any weights load."""

    problems: list[Problem]
    dataset: str
    split: str
    notes: list[str]
    folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    style: PromptStyle
    max_completion_length: int
    sampling: Sampling | None
    load_in_4bit: bool
    double_quant: bool


def prepare(config: EvaluateConfig) -> Examination:
    """Find the model, the problems, and the prompt they had in training.

    Raises:
        FileNotFoundError, ValueError: no adapter, model or data.
    """
    if config.adapter_dir is not None:
        record = read_record(check_adapter(config.adapter_dir, "evaluate.py", "checkpoint"))
        folder = record.find_base(config.model)
    else:
        folder = resolve_model(config.model)
        record = read_record(folder)
    problems, dataset, split, notes, task = held_out_problems(config, record)
    style = replace(record.style, task=task)
    if not record.trained:
        style = PromptStyle(task.system_prompt, task=task)
        notes.append(
            f"no train_config.json lies with {record.folder}: asked with the built-in prompt, on "
            f"{dataset} ({split})"
        )
    tokenizer = load_tokenizer(record.tokenizer_folder(folder))
    fit_padding(tokenizer, folder)
    stored = is_stored_in_4bit(folder)
    in_4bit = stored or (record.load_in_4bit and record.is_adapter)
    return Examination(
        problems=problems,
        dataset=dataset,
        split=split,
        notes=notes,
        folder=folder,
        tokenizer=tokenizer,
        style=fit_style(tokenizer, style),
        max_completion_length=config.max_completion_length or record.max_completion_length,
        sampling=build_sampling(config, record),
        load_in_4bit=in_4bit if stored or config.load_in_4bit is None else config.load_in_4bit,
        double_quant=record.double_quant,
    )


def build_sampling(config: EvaluateConfig, record: RunRecord) -> Sampling | None:
    """Return how to sample, None for greedy decoding only."""
    if config.num_samples is None:
        return None
    temperature = config.temperature or record.trained.get("temperature") or 1.0
    return Sampling(config.num_samples, temperature, config.seed)


def evaluate(
    config: EvaluateConfig,
    progress: Progress = lambda name, total: nullcontext(lambda count: None),
) -> dict[str, Any]:
    """Return what `eval.json` holds for the models asked for, and write it where `output` says.

    Raises:
        FileNotFoundError, ValueError: no adapter, model or data, each before any weights load.
    """
    if config.output is not None:
        check_room(config.output, ROOM_FOR_ITEMS * (1 + (config.num_samples or 0)), "--output")
    gpu = find_gpu()
    choice = choose_backend("transformers", config.rollout, gpu)
    claim(choice)
    asked = prepare(config)
    check_4bit(choice, gpu, asked.load_in_4bit)
    placement = choose_placement()
    engine = evaluation_engine(config, asked, placement) if choice.rollout == "vllm" else None
    with open_policy(
        asked.folder,
        asked.tokenizer,
        placement,
        asked.load_in_4bit,
        asked.double_quant,
        config.batch_size,
        engine,
    ) as policy:
        models: dict[str, list[Item]] = {}
        samples: dict[str, list[list[Item]]] = {}
        for name in ("base", "adapter") if config.adapter_dir else ("base",):
            if name == "adapter":
                policy.use_adapter(config.adapter_dir)
            models[name] = answers(asked, policy, progress, name)
            if asked.sampling:
                flat, each = (
                    answers(asked, policy, progress, name, asked.sampling),
                    config.num_samples,
                )
                samples[name] = [flat[row : row + each] for row in range(0, len(flat), each)]
    report = build_evaluation(asked.dataset, asked.split, models)
    if asked.sampling:
        report["sampled"] = build_sampled(asked.problems, samples, asked.sampling, asked.style.task)
    if asked.notes:
        report["notes"] = asked.notes
    if config.output is not None:
        items = build_eval_items(asked.problems, models, asked.style.task)
        write_jsonl(config.beside("items"), items)
        if asked.sampling:
            rows = build_sampled_items(asked.problems, samples, asked.style.task)
            write_jsonl(config.beside("samples"), rows)
        write_json(config.output, report)
    return report


def answers(
    asked: Examination,
    policy: Policy,
    progress: Progress,
    name: str,
    sampling: Sampling | None = None,
) -> list[Item]:
    """Return what a model answers to the problems, greedily or sampled."""
    total = len(asked.problems) * (sampling.num_samples if sampling else 1)
    with progress(f"{name}, sampled" if sampling else name, total) as advance:
        return evaluate_model(
            policy,
            asked.tokenizer,
            asked.problems,
            asked.style,
            asked.max_completion_length,
            advance,
            sampling,
        )


def evaluation_engine(
    config: EvaluateConfig, asked: Examination, placement: Placement
) -> "EngineSettings":
    """Return the settings of an engine that has the GPU to itself and fits the longest problem."""
    from lora_grpo.policy.vllm import EngineSettings, allowed_rank

    prompts = [
        render(asked.tokenizer, build_messages(p.question, asked.style)) for p in asked.problems
    ]
    adapter = read_json(config.adapter_dir / CONFIG) if config.adapter_dir else {}
    return EngineSettings(
        placement=placement,
        max_model_len=max(count_tokens(asked.tokenizer, prompts)) + asked.max_completion_length,
        max_num_seqs=config.batch_size,
        max_lora_rank=allowed_rank(lora_rank(adapter)),
        load_in_4bit=asked.load_in_4bit,
        gpu_memory_utilization=free_share() if placement.device == "cuda" else None,
    )


def free_share() -> float:
    """Return the share of the GPU's memory that the engine may take: most of what is free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return min(WHOLE_CARD, MOST_OF_FREE * free / total)
