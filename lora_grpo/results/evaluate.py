"""Evaluate models on held-out problems: greedy decoding, one sample per problem, the training
prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lora_grpo.config.train_config import Rollout
from lora_grpo.data.gold import DecimalSeparator
from lora_grpo.data.problems import Problem, read_problems
from lora_grpo.data.prompt import PromptStyle, build_messages, count_tokens, render
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
from lora_grpo.policy.generate import Advance
from lora_grpo.policy.open import Policy, open_policy
from lora_grpo.results.records import lora_rank
from lora_grpo.results.scoring import Item, build_eval_items, build_evaluation, judge
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.rewards.usable import Sieve, keep_usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_grpo.policy.vllm import EngineSettings

ROOM_FOR_ITEMS = 2**24
WHOLE_CARD, MOST_OF_FREE = 0.85, 0.95


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
    decimal_separator: DecimalSeparator = "auto"
    """How gold answers write decimals: auto is comma where they can be read in no other way."""
    num_items: int | None = None
    """Use only this many problems, the first ones; by default all."""
    max_completion_length: int | None = None
    """Longest completion in tokens; by default the length trained with, or 512."""
    load_in_4bit: bool | None = None
    """Hold the base in NF4; by default as it was trained, or not."""
    batch_size: int = 32
    """Problems per batch."""
    rollout: Rollout = "auto"
    """What generates: vllm, or transformers' generate; auto is vllm with a GPU, if installed."""
    output: Path | None = None
    """Write eval.json to this file, and the items beside it; existing files are not overwritten."""

    def __post_init__(self) -> None:
        if self.adapter_dir is None and self.model is None:
            raise ValueError("give an adapter directory such as adapters/tiny, or --model")
        for name in ("num_items", "max_completion_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.output is not None and self.output.exists():
            raise ValueError(
                f"--output {self.output} exists already: choose another name or move it"
            )


def evaluate_model(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    style: PromptStyle,
    max_completion_length: int,
    advance: Advance = lambda count: None,
) -> list[Item]:
    """Generate one greedy completion per problem and score it, in the problems' order."""
    prompts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    completions = [
        replace(done, text=style.prefill + done.text)
        for done in policy.complete(prompts, max_completion_length, advance)
    ]
    return [
        judge(problem, done, style.task)
        for problem, done in zip(problems, completions, strict=True)
    ]


def held_out_problems(
    config: EvaluateConfig, record: RunRecord
) -> tuple[list[Problem], str, str, list[str]]:
    """Return the problems to evaluate on, their dataset's and split's names, and notes on how they
    were read and what was dropped.

    Raises:
        FileNotFoundError, ValueError: no data, or none whose gold answer can be paid.
    """
    saved, rows = record.trained, read_jsonl(record.records / EVAL_ITEMS)
    if config.dataset is None and rows:
        report = read_json(record.records / EVAL)
        problems = [Problem(row["index"] + 1, row["question"], row["answer"]) for row in rows]
        return problems[: config.num_items], report["dataset"], report["split"], []
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
    )
    sieve = Sieve(strict=False)
    problems = keep_usable(sieve, reading.split, reading, build_rewards())
    return problems[: config.num_items], dataset, reading.split, sieve.notes


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
    problems, dataset, split, notes = held_out_problems(config, record)
    if not record.trained:
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
        style=record.fitted_style(tokenizer),
        max_completion_length=config.max_completion_length or record.max_completion_length,
        load_in_4bit=in_4bit if stored or config.load_in_4bit is None else config.load_in_4bit,
        double_quant=record.double_quant,
    )


def evaluate(
    config: EvaluateConfig,
    progress: Callable[[str, int], Advance] = lambda name, total: lambda count: None,
) -> dict[str, Any]:
    """Return what `eval.json` holds for the models asked for, and write it where `output` says.

    Raises:
        FileNotFoundError, ValueError: no adapter, model or data, each before any weights load.
    """
    if config.output is not None:
        check_room(config.output, ROOM_FOR_ITEMS, "--output")
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
        models = {}
        for name in ("base", "adapter") if config.adapter_dir else ("base",):
            if name == "adapter":
                policy.use_adapter(config.adapter_dir)
            models[name] = evaluate_model(
                policy,
                asked.tokenizer,
                asked.problems,
                asked.style,
                asked.max_completion_length,
                progress(name, len(asked.problems)),
            )
    report = build_evaluation(asked.dataset, asked.split, models)
    if asked.notes:
        report["notes"] = asked.notes
    if config.output is not None:
        items = config.output.with_name(config.output.stem + "_items.jsonl")
        write_jsonl(items, build_eval_items(asked.problems, models))
        write_json(config.output, report)
    return report


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
