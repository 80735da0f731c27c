"""The command that plans memory: a run's flags in, a table or JSON out, before any weights load."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lora_grpo.allocator import gives_back
from lora_grpo.backend import Choice, choose_backend
from lora_grpo.config import TrainConfig, flag
from lora_grpo.hardware import available_memory, find_gpu
from lora_grpo.memory import GIB
from lora_grpo.memory_measure import measure, shortened
from lora_grpo.memory_plan import MemoryPlan, gigabytes, plan_memory
from lora_grpo.memory_prompts import longest_prompt
from lora_grpo.memory_report import as_record, print_plan
from lora_grpo.model_shape import find_shape
from lora_grpo.presets import parse_train_config

PLANNED, NOTHING_FITS = 0, 1


@dataclass(frozen=True)
class PlanMemoryConfig(TrainConfig):
    """Predict the peak memory of a training run, and choose settings with which it fits.

    Takes train_lora.py's flags. --gpu-memory 8 plans for an 8 GB card even where there is none.
    """

    json: bool = False
    """Print the plan as JSON."""
    measure: bool = False
    """Then make a few steps for real on this CPU, and print the measured peak beside the plan."""


@dataclass(frozen=True)
class Target:
    """What a plan is for: the machine, the engines, the memory, and what was assumed."""

    choice: Choice
    device: str
    dtype: str
    budget_bytes: int
    total_bytes: int
    notes: tuple[str, ...]


def find_target(config: TrainConfig) -> Target:
    """Return the GPU found or asked for, else this machine's processor.

    Raises:
        ValueError: the backend or rollout that was asked for cannot work here.
    """
    gpu = find_gpu()
    asked = None if config.gpu_memory is None else int(config.gpu_memory * GIB)
    if gpu is not None:
        choice = choose_backend(config.backend, config.rollout, gpu)
        dtype = config.dtype or ("bfloat16" if gpu.has_bfloat16 else "float16")
        budget = asked or gpu.free_bytes
        note = f"{gpu.name}: {gigabytes(gpu.free_bytes)} of {gigabytes(gpu.total_bytes)} free"
        return Target(choice, "cuda", dtype, budget, gpu.total_bytes, (note,))
    if asked is None:
        choice = choose_backend(config.backend, config.rollout, None)
        free = available_memory()
        note = "no GPU: memory of the process on this CPU, against what is available now"
        return Target(choice, "cpu", config.dtype or "float32", free, free, (note,))
    backend = "unsloth" if config.backend == "auto" else config.backend
    rollout = "vllm" if config.rollout == "auto" else config.rollout
    choice = Choice(backend, rollout, "assumed", "assumed")
    note = (
        f"no GPU here: planned for a card of {config.gpu_memory:g} GB, all of it free, with "
        f"{backend} and {rollout} as requirements.txt installs them"
    )
    return Target(choice, "cuda", config.dtype or "bfloat16", asked, asked, (note,))


def make_memory_plan(config: TrainConfig) -> tuple[MemoryPlan, tuple[str, ...]]:
    """Return the plan of a configuration, and the notes that belong to it.

    Raises:
        FileNotFoundError, ValueError: what is wrong and what to do, in one sentence.
    """
    target = find_target(config)
    shape, source = find_shape(config)
    prompt = longest_prompt(config)
    known = f"prompts of up to --max-prompt-length {config.max_prompt_length} tokens"
    if prompt is not None:
        known = f"the longest prompt of the data has {prompt} tokens"
    settled = dataclasses.replace(config, dtype=target.dtype)
    plan = plan_memory(
        settled,
        shape,
        target.choice,
        target.device,
        target.dtype,
        target.budget_bytes,
        target.total_bytes,
        prompt,
        gives_back(shape.hidden_size),
    )
    return plan, (*target.notes, source, known)


def parse(arguments: Sequence[str]) -> tuple[PlanMemoryConfig, MemoryPlan, tuple[str, ...]]:
    """Return the configuration, its plan and notes; what will be measured is planned as short."""
    config, why = parse_train_config(arguments, PlanMemoryConfig)
    if config.measure:
        few = shortened(arguments, find_shape(config)[0].hidden_size)
        config, why = parse_train_config([*few, "--measure"], PlanMemoryConfig)
    plan, notes = make_memory_plan(config)
    if config.measure and plan.job.device != "cpu":
        raise ValueError(
            "--measure reads the memory of a process on a CPU: on a GPU a training run logs its "
            "measured peak in metrics.jsonl"
        )
    return config, plan, (why, *notes)


def run(arguments: Sequence[str]) -> int:
    """Plan, print, measure where asked, and return the exit status.

    0 it fits, 1 nothing fits.

    Raises:
        OSError, ValueError: bad input.
        FailedError: the measured run failed.
    """
    as_json = "--json" in arguments
    config, plan, notes = parse(arguments)
    record = as_record(config, plan, notes)
    if not as_json:
        print_plan(config, plan, notes)
    if config.measure:
        flags = [*arguments, *setting_flags(plan)]
        measured = measure(flags, plan.job.shape.hidden_size)
        record["measured_bytes"] = measured
        if not as_json:
            print(comparison(plan, measured))
    if as_json:
        print(json.dumps(record, indent=2))
    return PLANNED if plan.fits else NOTHING_FITS


def comparison(plan: MemoryPlan, measured: int) -> str:
    """Return the predicted peak beside the measured one."""
    error = plan.peak_bytes / measured - 1
    peaks = f"predicted {gigabytes(plan.peak_bytes)}, measured {gigabytes(measured)}"
    return f"{peaks}: the prediction is {error:+.1%} off"


def setting_flags(plan: MemoryPlan) -> list[str]:
    """Return a plan's settings as flags of the training command."""
    flags = []
    for name, value in plan.settings.items():
        if isinstance(value, bool):
            flags.append(flag(name if value else f"no_{name}"))
        else:
            flags += [flag(name), str(value)]
    return flags
