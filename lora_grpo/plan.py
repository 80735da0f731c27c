"""What a run will do, known before any weights load: its directory, its size, its memory."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.allocator import gives_back
from lora_grpo.backend import Choice, check_4bit, choose_backend, claim
from lora_grpo.config import TrainConfig
from lora_grpo.hardware import GPU, available_memory, find_gpu
from lora_grpo.memory import GIB
from lora_grpo.memory_plan import MemoryPlan, gigabytes, plan_memory
from lora_grpo.memory_report import describe_memory
from lora_grpo.model import Placement, choose_placement, load_tokenizer, read_config, resolve_model
from lora_grpo.model_shape import read_shape
from lora_grpo.prepare import Data, prepare_data
from lora_grpo.presets import NEEDS_GPU
from lora_grpo.rewards import Reward, build_rewards, parse_reward_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    """A checked run: everything but the weights."""

    config: TrainConfig
    choice: Choice
    memory: MemoryPlan | None
    free_before: int
    run_dir: Path
    folder: Path
    placement: Placement
    tokenizer: "PreTrainedTokenizerBase"
    rewards: list[Reward]
    data: Data
    steps: int
    parameters: int
    trained_parameters: int


def name_run(config: TrainConfig) -> Path:
    """Return the directory that the run will write.

    Raises:
        FileExistsError: it was named and is there already.
    """
    if config.resume:
        return config.resume
    if config.run_name:
        run_dir = config.adapters_dir / config.run_name
        if run_dir.exists():
            raise FileExistsError(
                f"--run-name {config.run_name}: {run_dir} exists already and is never "
                "overwritten: choose another "
                f"name, or go on with it by --resume {run_dir}"
            )
        return run_dir
    base = config.preset or Path(config.model).name.lower()
    names = [base, *(f"{base}-{number}" for number in range(2, 10_000))]
    return next(
        config.adapters_dir / name for name in names if not (config.adapters_dir / name).exists()
    )


def count_steps(config: TrainConfig, num_problems: int) -> int:
    """Return the updates that the run makes."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(config.num_train_epochs * num_problems / config.prompts_per_step)
    return batches * config.num_iterations


def count_parameters(folder: Path, config: TrainConfig) -> tuple[int, int]:
    """Return the parameters of the model and of the adapter, from `config.json` alone.

    Raises:
        ValueError: a target module that the model does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(folder), trust_remote_code=False)
    sizes: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer = name.rpartition(".")[2]
            sizes.setdefault(layer, []).append(module.in_features + module.out_features)
    missing = sorted(set(config.target_modules) - sizes.keys())
    if missing:
        raise ValueError(
            f"--target-modules {' '.join(missing)}: the model has no such linear layer, it has "
            f"{' '.join(name for name in sizes if name != 'lm_head')}"
        )
    trained = config.r * sum(sum(sizes[name]) for name in config.target_modules)
    return sum(parameter.numel() for parameter in model.parameters()), trained


def choose_machine(config: TrainConfig, gpu: GPU | None) -> Choice:
    """Return the backend and rollout of the run, ready to be imported unless nothing will run.

    Raises:
        ValueError: the preset or the choice cannot work on this machine.
    """
    only_looking = config.dry_run or config.preview
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process on one "
            "GPU: start it without accelerate launch or torchrun"
        )
    if config.preset in NEEDS_GPU and gpu is None and not only_looking:
        raise ValueError(
            f"--preset {config.preset} needs an NVIDIA GPU, and nvidia-smi lists none: use "
            "--preset tiny, which learns in minutes on a CPU, or see what this one would do by "
            f"python scripts/plan_memory.py --preset {config.preset} --gpu-memory 8"
        )
    if config.gpu_memory is not None and gpu is None:
        raise ValueError(
            f"--gpu-memory {config.gpu_memory:g}: nvidia-smi lists no GPU: leave it out, or see "
            "what such a card would hold by scripts/plan_memory.py"
        )
    choice = choose_backend(config.backend, config.rollout, gpu)
    check_4bit(choice, gpu, config.load_in_4bit)
    if not only_looking:
        claim(choice)
    return choice


def check_engine(config: TrainConfig, choice: Choice, folder: Path) -> None:
    """Refuse what the chosen engine could not do, before anything is loaded or written.

    Raises:
        ValueError: a rank or a length that it does not have, a knob that it would override.
    """
    if choice.backend == "unsloth":
        from lora_grpo.unsloth_model import refuse_what_unsloth_changes

        refuse_what_unsloth_changes(config, folder)
    elif choice.rollout == "vllm":
        from lora_grpo.engine_settings import allowed_rank, check_positions

        allowed_rank(config.r)
        check_positions(config, folder)


def fit_memory(
    config: TrainConfig,
    folder: Path,
    choice: Choice,
    placement: Placement,
    gpu: GPU | None,
    longest_prompt: int,
) -> MemoryPlan | None:
    """Return the settings with which the run fits, or None for a model that nothing is known of.

    Raises:
        ValueError: nothing fits in the --gpu-memory that was given.
    """
    try:
        shape = read_shape(folder)
    except ValueError:
        return None
    on_gpu = placement.device == "cuda" and gpu is not None
    found = gpu.free_bytes if on_gpu else available_memory()
    asked = config.gpu_memory and int(config.gpu_memory * GIB)
    plan = plan_memory(
        config,
        shape,
        choice,
        placement.device,
        placement.dtype,
        min(asked or found, found) if on_gpu else found,
        gpu.total_bytes if on_gpu else None,
        longest_prompt,
        gives_back(shape.hidden_size),
    )
    if asked and on_gpu and not plan.fits:
        raise ValueError(
            f"--gpu-memory {config.gpu_memory:g} does not hold this run, whose peak would be "
            f"{gigabytes(plan.peak_bytes)}: {'; '.join(plan.advice)}"
        )
    return plan


def make_plan(config: TrainConfig) -> Plan:
    """Check the run and everything that it reads, without loading weights.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: what is wrong and what to do, in one
        sentence.
    """
    gpu = find_gpu()
    choice = choose_machine(config, gpu)
    weights = parse_reward_weights(config.reward_weight)
    rewards = build_rewards(config.reward_set, config.reward, weights, config.max_completion_length)
    run_dir = name_run(config)
    folder = resolve_model(
        config.model, config.revision, weights=not (config.dry_run or config.preview)
    )
    tokenizer = load_tokenizer(folder)
    parameters, trained = count_parameters(folder, config)
    data = prepare_data(config, tokenizer, rewards)
    placement = choose_placement(config.dtype)
    if gpu is not None and placement.device == "cpu":
        raise ValueError(
            f"nvidia-smi lists {gpu.name}, but torch cannot use it: python scripts/doctor.py says "
            "why; CUDA_VISIBLE_DEVICES= before the command trains on the CPU"
        )
    check_engine(config, choice, folder)
    memory = fit_memory(config, folder, choice, placement, gpu, data.longest_prompt)
    config = dataclasses.replace(
        config,
        **(memory.settings if memory else {}),
        dtype=placement.dtype,
        num_validation_items=data.num_validation_items,
        decimal_separator=data.decimal_separator,
        run_name=run_dir.name,
        backend=choice.backend,
        rollout=choice.rollout,
    )
    return Plan(
        config=config,
        choice=choice,
        memory=memory,
        free_before=gpu.free_bytes if gpu else 0,
        run_dir=run_dir,
        folder=folder,
        placement=placement,
        tokenizer=tokenizer,
        rewards=rewards,
        data=data,
        steps=count_steps(config, len(data.train)),
        parameters=parameters,
        trained_parameters=trained,
    )


def describe_plan(plan: Plan, why: str) -> list[tuple[str, str]]:
    """Return what will happen, as lines of a name and a text."""
    config, data = plan.config, plan.data
    bits = "4-bit NF4" if config.load_in_4bit else plan.placement.dtype
    trained, total = plan.trained_parameters, plan.parameters
    update = (
        f"{config.loss_type}, beta {config.beta}, learning rate {config.learning_rate:g} "
        f"{config.lr_scheduler_type}"
    )
    rewards = ", ".join(f"{reward.name} x {reward.weight:g}" for reward in plan.rewards)
    replaced = f"replaced by other prompts in up to {config.dynamic_sampling_rounds} rounds a step"
    return [
        ("settings", why),
        ("model", f"{config.model}: {total:,} parameters in {bits}, on {plan.placement.device}"),
        ("backend", f"{plan.choice.backend} ({plan.choice.why_backend})"),
        ("rollout", f"{plan.choice.rollout} ({plan.choice.why_rollout})"),
        (
            "adapter",
            (
                f"LoRA r {config.r}, alpha {config.lora_alpha}: {trained:,} parameters trained "
                f"({trained / total:.1%})"
            ),
        ),
        (
            "data",
            (
                f"{config.dataset}: {len(data.train):,} to train on, {len(data.validation):,} to "
                "choose the best step"
            ),
        ),
        (
            "test",
            f"{data.test_name} ({data.test_split}): {len(data.test):,}, base and adapter, greedy",
        ),
        *(("", note) for note in data.notes),
        ("rewards", rewards),
        (
            "steps",
            f"{plan.steps} of {config.prompts_per_step} prompts x {config.num_generations} "
            "completions of up to "
            f"{config.max_completion_length} tokens",
        ),
        *([("dead groups", replaced)] if config.dynamic_sampling else []),
        ("update", update),
        *(describe_memory(plan.memory) if plan.memory else []),
        ("writes", str(plan.run_dir)),
    ]
