"""The command that plans memory: a run's flags in, a table or JSON out, before any weights load."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.config.files import FLAGS_ONLY, SETTINGS
from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import read_problems, take_example
from lora_grpo.data.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    fit_style,
    read_system_prompt,
    render,
)
from lora_grpo.data.sources import BUILT_IN
from lora_grpo.machine.allocator import gives_back
from lora_grpo.machine.backend import choose_backend
from lora_grpo.machine.hardware import available_memory, find_gpu
from lora_grpo.machine.process import resident_peak, run_alone
from lora_grpo.memory.fit import MemoryPlan, as_record, gigabytes, plan_memory, print_plan
from lora_grpo.memory.shape import find_shape
from lora_grpo.memory.terms import GIB, Job
from lora_grpo.policy.base import is_local, load_tokenizer, resolve_model

MEASURED = {"max_steps": 2, "num_eval_items": 2, "num_validation_items": 0}


@dataclass(frozen=True)
class PlanMemoryConfig(TrainConfig):
    """Predict the peak memory of a training run, and choose settings with which it fits.

    Takes train_lora.py's flags. --gpu-memory 8 plans for an 8 GB card even where there is none.
    """

    json: bool = False
    """Print the plan as JSON."""
    measure: bool = False
    """Then make two steps for real on this CPU, and print the measured peak beside the plan."""


def longest_prompt(config: TrainConfig) -> int | None:
    """Return the tokens of the longest training prompt that is kept; None where the tokenizer or
    the data is not on this machine.

    Raises:
        FileNotFoundError, ValueError: data or a tokenizer that cannot be read.
    """
    has_data = config.dataset == BUILT_IN or Path(config.dataset).expanduser().exists()
    if not has_data or not is_local(config.model):
        return None
    folder = resolve_model(config.model, weights=False)
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    columns = (config.question_column, config.answer_column)
    reading = read_problems(config.dataset, "train", *columns, "--dataset")
    problems, example = take_example(reading.problems, config.one_shot)
    system_prompt = read_system_prompt(config.system_prompt_file)
    style = fit_style(tokenizer, PromptStyle(system_prompt, example))
    texts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    kept = [size for size in count_tokens(tokenizer, texts) if size <= config.max_prompt_length]
    return max(kept, default=None)


def make_plan(config: TrainConfig) -> tuple[MemoryPlan, tuple[str, ...]]:
    """Return the plan for the GPU found or asked for, else for this machine's processor, and what
    was assumed.

    Raises:
        FileNotFoundError, ValueError: what is wrong and what to do, in one sentence.
    """
    gpu = find_gpu()
    asked = None if config.gpu_memory is None else int(config.gpu_memory * GIB)
    if gpu is not None:
        device, dtype = "cuda", "bfloat16" if gpu.has_bfloat16 else "float16"
        budget, total = asked or gpu.free_bytes, gpu.total_bytes
        note = f"{gpu.name}: {gigabytes(gpu.free_bytes)} of {gigabytes(total)} free"
    elif asked is not None:
        device, dtype, budget, total = "cuda", "bfloat16", asked, asked
        note = f"no GPU here: planned for a card of {config.gpu_memory:g} GB, all of it free"
    else:
        device, dtype, budget, total = "cpu", "float32", available_memory(), None
        note = "no GPU: memory of the process on this CPU, against what is available now"
    if gpu is None and asked is not None:
        backend = "unsloth" if config.backend == "auto" else config.backend
        rollout = "vllm" if config.rollout == "auto" else config.rollout
    else:
        choice = choose_backend(config.backend, config.rollout, gpu)
        backend, rollout = choice.backend, choice.rollout
    shape, source = find_shape(config)
    prompt = longest_prompt(config)
    known = f"prompts of up to --max-prompt-length {config.max_prompt_length} tokens"
    if prompt is not None:
        known = f"the longest prompt of the data has {prompt} tokens"
    job = Job(
        shape=shape,
        config=config,
        backend=backend,
        rollout=rollout,
        device=device,
        dtype=config.dtype or dtype,
        prompt_length=prompt or config.max_prompt_length,
        total_bytes=total,
        gives_back=gives_back(shape.hidden_size, device),
    )
    return plan_memory(job, budget), (note, source, known)


def measure(config: TrainConfig) -> int:
    """Make the run in a process of its own and return its peak resident bytes.

    Raises:
        FailedError: the run failed; the message holds the end of what it printed.
    """
    names = SETTINGS.keys() - FLAGS_ONLY
    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as folder:
        settings = {name: value for name, value in vars(config).items() if name in names}
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(settings, default=str), encoding="utf-8")
        command = [sys.executable, "-m", "lora_grpo.cli", "train", "--config", str(path)]
        return resident_peak(run_alone([*command, "--quiet", "--adapters-dir", folder]))


def run(arguments: Sequence[str]) -> int:
    """Plan, print, measure where asked, and return the exit status: 0 it fits, 1 nothing fits.

    Raises:
        OSError, ValueError: bad input.
        FailedError: the measured run failed.
    """
    config, why = parse_train_config(arguments, PlanMemoryConfig)
    if config.measure:
        config = dataclasses.replace(config, **MEASURED)
    plan, notes = make_plan(config)
    if config.measure and plan.job.device != "cpu":
        raise ValueError(
            "--measure reads the memory of a process on a CPU: on a GPU a training run logs its "
            "measured peak in metrics.jsonl"
        )
    record = as_record(plan, (why, *notes))
    if not config.json:
        print_plan(plan, (why, *notes))
    if config.measure:
        record["measured_bytes"] = measured = measure(plan.job.config)
        if not config.json:
            print(
                f"predicted {gigabytes(plan.peak_bytes)}, measured {gigabytes(measured)}: the "
                f"prediction is {plan.peak_bytes / measured - 1:+.1%} off"
            )
    if config.json:
        print(json.dumps(record, indent=2))
    return 0 if plan.fits else 1
