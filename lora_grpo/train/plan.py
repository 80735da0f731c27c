"""The plan of a training run: everything is checked and resolved before any weights load."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.config.presets import NEEDS_GPU
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.prompt import find_turn_end, perfect_completion
from lora_grpo.data.worked import Worked, build_worked
from lora_grpo.machine.allocator import gives_back
from lora_grpo.machine.backend import Choice, check_4bit, choose_backend, claim
from lora_grpo.machine.hardware import GPU, available_memory, find_gpu
from lora_grpo.machine.terminal import command_line
from lora_grpo.memory.fit import (
    MemoryPlan,
    describe_memory,
    gigabytes,
    plan_memory,
    settle_unplanned,
)
from lora_grpo.memory.shape import read_shape
from lora_grpo.memory.terms import GIB, Job
from lora_grpo.policy.base import (
    Placement,
    check_trainable,
    choose_placement,
    is_stored_in_4bit,
    load_tokenizer,
    read_config,
    resolve_model,
)
from lora_grpo.rewards.builtin import Reward, build_rewards, parse_reward_weights, try_rewards
from lora_grpo.rewards.calls import Calls
from lora_grpo.train.given_adapter import check_fits, find_given, take_shape
from lora_grpo.train.prepare import Data, prepare_data, read_training_data
from lora_grpo.train.trackers import check_trackers
from lora_grpo.train.unused_settings import describe_unused, find_unused

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
    worked: list[Worked]
    given: Path | None
    steps: int
    parameters: int
    trained_parameters: int
    unused: dict[str, str]
    unplanned: str
    notes: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting with the value that the run uses; None if the run does not read it."""
        return vars(self.config) | dict.fromkeys(self.unused)


def name_run(config: TrainConfig) -> Path:
    """Return the directory that the run will write.

    Raises:
        FileExistsError: `--run-name` names a directory that exists.
    """
    if config.resume:
        return config.resume
    if config.run_name:
        run_dir = config.adapters_dir / config.run_name
        if run_dir.exists():
            raise FileExistsError(
                f"--run-name {config.run_name}: {run_dir} exists already and is never "
                f"overwritten: choose another name, or resume it with --resume {run_dir}"
            )
        return run_dir
    base = config.preset or Path(config.model).name.lower()
    run_dir, number = config.adapters_dir / base, 2
    while run_dir.exists():
        run_dir, number = config.adapters_dir / f"{base}-{number}", number + 1
    return run_dir


def count_steps(config: TrainConfig, num_problems: int) -> int:
    """Return the number of updates that the run makes."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(config.num_train_epochs * num_problems / config.prompts_per_step)
    return batches * config.num_iterations


def count_candidates(config: TrainConfig, num_problems: int) -> int | None:
    """Return how many problems the difficulty filter samples, or None without it."""
    if not config.difficulty_filter:
        return None
    prompts = math.ceil(config.max_steps / config.num_iterations) * config.prompts_per_step
    return min(config.difficulty_problems or prompts, num_problems)


def count_parameters(folder: Path, config: TrainConfig, given: Path | None) -> tuple[int, int]:
    """Return how many parameters the model and the adapter have, without loading weights.

    Raises:
        ValueError: the model does not have a target module, PEFT refuses the adapter, or the
            adapter that is given does not fit.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_grpo.grpo.settings import lora_config, saying

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(folder), trust_remote_code=False)
    modules = model.named_modules()
    layers = [name.rpartition(".")[2] for name, m in modules if isinstance(m, torch.nn.Linear)]
    missing = sorted(set(config.target_modules) - set(layers))
    if missing:
        raise ValueError(
            f"--target-modules {' '.join(missing)}: the model has no such linear layer, it has "
            f"{' '.join(name for name in dict.fromkeys(layers) if name != 'lm_head')}"
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"), torch.random.fork_rng([]), saying("the adapter"):
        adapted = get_peft_model(model, lora_config(config))
    if given is not None:
        check_fits(config, given, adapted)
    return total, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def choose_machine(config: TrainConfig, gpu: GPU | None) -> Choice:
    """Return the backend and the rollout of the run, and prepare their import if it will run.

    Raises:
        ValueError: the preset or the choice cannot work on this machine.
    """
    only_looking = config.dry_run or config.preview
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but a run is one process on one GPU: start "
            "it without accelerate launch or torchrun"
        )
    if config.preset in NEEDS_GPU and gpu is None and not only_looking:
        raise ValueError(
            f"--preset {config.preset} needs an NVIDIA GPU, and none was found: use "
            "--preset tiny, which learns in minutes on a CPU, or see what this one would do by "
            + command_line("plan_memory.py", "--preset", config.preset, "--gpu-memory", 8)
        )
    if config.gpu_memory is not None and gpu is None:
        raise ValueError(
            f"--gpu-memory {config.gpu_memory:g}: no GPU was found: leave it out, or see "
            f"what such a card would hold by {command_line('plan_memory.py')}"
        )
    choice = choose_backend(config.backend, config.rollout, gpu)
    check_4bit(choice, gpu, config.load_in_4bit)
    if not only_looking:
        claim(choice)
    return choice


def check_engine(config: TrainConfig, choice: Choice, folder: Path) -> None:
    """Refuse settings that the chosen engine does not support, before anything is loaded.

    Raises:
        ValueError: the rank or the length is too large, or the engine would change a setting.
    """
    if choice.rollout == "vllm" and config.top_p < 1:
        raise ValueError(
            f"--top-p {config.top_p:g} with --rollout vllm: vLLM's log-probs are of the truncated "
            "distribution, so they cannot be compared with the policy's: use --top-p 1, or "
            "--rollout generate"
        )
    if choice.backend == "unsloth":
        from lora_grpo.policy.unsloth import refuse_what_unsloth_changes

        refuse_what_unsloth_changes(config, folder)
    elif choice.rollout == "vllm":
        from lora_grpo.policy.vllm import allowed_rank, check_positions

        allowed_rank(config.r)
        check_positions(config, folder)


def fit_memory(
    config: TrainConfig,
    folder: Path,
    choice: Choice,
    placement: Placement,
    gpu: GPU | None,
    longest_prompt: int,
) -> tuple[dict[str, Any], MemoryPlan | None, str]:
    """Return the settings that make the run fit, and the memory plan, or why there is none.

    Raises:
        ValueError: no settings fit into the given --gpu-memory.
    """
    try:
        shape = read_shape(folder)
    except ValueError as error:
        settings, unplanned = settle_unplanned(config, choice, gpu, str(error))
        return settings, None, unplanned
    on_gpu = placement.device == "cuda" and gpu is not None
    found = gpu.free_bytes if on_gpu else available_memory()
    asked = config.gpu_memory and int(config.gpu_memory * GIB)
    job = Job(
        shape=shape,
        config=config,
        backend=choice.backend,
        rollout=choice.rollout,
        device=placement.device,
        dtype=placement.dtype,
        prompt_length=longest_prompt,
        total_bytes=gpu.total_bytes if on_gpu else None,
        gives_back=gives_back(shape.hidden_size, placement.device),
    )
    plan = plan_memory(job, min(asked or found, found) if on_gpu else found)
    if asked and on_gpu and not plan.fits:
        raise ValueError(
            f"--gpu-memory {config.gpu_memory:g} does not hold this run, whose peak would be "
            f"{gigabytes(plan.peak_bytes)}: {'; '.join(plan.advice)}"
        )
    return plan.settings, plan, ""


def describe_words(data: Data) -> list[str]:
    """Return a note if the task cannot read gold answers: such answers never count as correct."""
    problems, task = [*data.train, *data.validation, *data.test], data.style.task
    words = [problem.answer for problem in problems if not task.can_read(problem.answer)]
    if not words:
        return []
    return [
        f"{len(words):,} of {len(problems):,} gold answers are no {task.noun}s, such as "
        f"{words[0]!r:.40}: strict accuracy and the choice of the best step count only "
        f"{task.noun}s between the tags; judge the run by its rewards"
    ]


def make_plan(config: TrainConfig) -> Plan:
    """Check the run and everything that it reads, without loading weights.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the message says what is wrong and what to
        do, in one sentence.
    """
    check_trackers(config.report_to)
    gpu = find_gpu()
    choice = choose_machine(config, gpu)
    from transformers import TrainerState

    from lora_grpo.grpo.settings import check_update

    weights, length = parse_reward_weights(config.reward_weight), config.max_completion_length
    reading = read_training_data(config)
    calls = Calls(config.reward_workers, config.reward_timeout)
    rewards = build_rewards(config.reward_set, config.reward, weights, length, reading.task, calls)
    run_dir = name_run(config)
    folder = resolve_model(
        config.model, config.revision, weights=not (config.dry_run or config.preview)
    )
    check_trainable(folder)
    if is_stored_in_4bit(folder):
        check_4bit(choice, gpu, True)
        config = dataclasses.replace(config, load_in_4bit=True)
    tokenizer = load_tokenizer(folder)
    given = find_given(config, run_dir)
    if given is not None:
        config = take_shape(config, given, folder)
    parameters, trained = count_parameters(folder, config, given)
    data = prepare_data(config, tokenizer, rewards, reading)
    steps = count_steps(config, len(data.train))
    worked, found = [], ""
    if config.sft_steps:
        worked, found = build_worked(
            data.train, data.style, tokenizer, config.max_completion_length
        )
    try_rewards(
        rewards,
        data.train,
        reading.task,
        trainer_state=TrainerState(max_steps=steps),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
    )
    placement = choose_placement(config.dtype)
    if gpu is not None and placement.device == "cpu":
        raise ValueError(
            f"there is a GPU, {gpu.name}, but PyTorch cannot use it: {command_line('doctor.py')} "
            "says why; CUDA_VISIBLE_DEVICES= before the command trains on the CPU"
        )
    check_engine(config, choice, folder)
    check_update(config, placement, rewards, steps)
    settings, memory, unplanned = fit_memory(
        config, folder, choice, placement, gpu, data.longest_prompt
    )
    unused = find_unused(config, choice, placement)
    notes = [*describe_unused(config, unused), *describe_words(data)]
    notes += [f"--sft-steps: {found}"] if found else []
    config = dataclasses.replace(
        config,
        **settings,
        **config.loss_settings,
        **config.vllm_correction,
        dtype=placement.dtype,
        num_validation_items=data.num_validation_items,
        difficulty_problems=count_candidates(config, len(data.train)),
        task=reading.task.name,
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
        worked=worked,
        given=given,
        steps=steps,
        parameters=parameters,
        trained_parameters=trained,
        unused=unused,
        unplanned=unplanned,
        notes=notes,
    )


def describe_update(config: TrainConfig) -> str:
    """Return the loss with the settings that it reads, and the learning rate."""
    settings = ", ".join(f"{name} {value}" for name, value in config.loss_settings.items())
    bonus = f", entropy_coef {config.entropy_coef:g}" if config.entropy_coef else ""
    return (
        f"{config.loss_type}, {settings}, beta {config.beta}{bonus}, learning rate "
        f"{config.learning_rate:g} {config.lr_scheduler_type}"
    )


def describe_rewards(plan: Plan) -> str:
    """Return the rewards with their weights, and how they are put together if not summed."""
    rewards = ", ".join(f"{reward.name} x {reward.weight:g}" for reward in plan.rewards)
    aggregation = plan.config.multi_objective_aggregation
    return rewards if aggregation == "sum_then_normalize" else f"{rewards}; {aggregation}"


def describe_filter(config: TrainConfig) -> list[tuple[str, str]]:
    """Return what the difficulty filter samples before the first step, and what that costs."""
    if not config.difficulty_filter:
        return []
    samples = config.difficulty_samples * config.difficulty_problems
    return [
        (
            "difficulty",
            f"{config.difficulty_samples} completions for each of {config.difficulty_problems:,} "
            f"problems first, as many as {samples / config.completions_per_step:.0f} steps sample; "
            "those always or never right are left out"
            + (", the others go from easy to hard" if config.curriculum else ""),
        )
    ]


def describe_start(config: TrainConfig) -> list[tuple[str, str]]:
    """Return rows on the adapter that is continued, and on the supervised fine-tuning before GRPO,
    if there are any."""
    given = [("start", f"the adapter {config.adapter}")] if config.adapter else []
    if not config.sft_steps:
        return given
    return [
        *given,
        (
            "warm-up",
            f"{config.sft_steps} steps of supervised fine-tuning on {config.prompts_per_step} "
            f"worked solutions each, learning rate {config.sft_learning_rate:g} falling to 0",
        ),
    ]


def describe_model(plan: Plan) -> list[tuple[str, str]]:
    """Return what is unusual about the base and its chat template."""
    folder, style, tokenizer, lines = plan.folder, plan.data.style, plan.tokenizer, []
    if is_stored_in_4bit(folder):
        lines.append(
            "stored in 4-bit NF4 and loaded as it is; to merge the adapter later, give the 16-bit "
            "original with merge_adapter.py --model"
        )
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        lines.append(
            "stored as .bin, which can be trained but not merged into: load it with transformers, "
            "save_pretrained it into a new folder, and train on that"
        )
    if not style.system_role:
        lines.append(
            "its chat template writes no system turn: the system prompt opens the first user turn"
        )
    if style.prefill:
        lines.append(
            f"its chat template begins each answer with {style.prefill!r}: completions are scored "
            "with that in front" + warn_of_format(plan)
        )
    end = find_turn_end(tokenizer)
    if end not in (None, tokenizer.eos_token_id):
        lines.append(
            f"its chat template ends a turn with {tokenizer.convert_ids_to_tokens(end)}, not with "
            f"the EOS token {tokenizer.eos_token}: either ends a completion"
        )
    return [("", line) for line in lines]


def warn_of_format(plan: Plan) -> str:
    """Return a warning if no answer that the template has begun can earn the format reward."""
    task, prefill = plan.data.style.task, plan.data.style.prefill
    rest = perfect_completion(plan.data.train[0], task)
    begun = rest if rest.startswith(prefill.strip()) else prefill + rest
    paid = {"format", "strict_format", "soft_format"} & {reward.name for reward in plan.rewards}
    if task.has_format(begun) or not paid:
        return ""
    return (
        f", so that {', '.join(sorted(paid))} can never be paid: use rewards and a system prompt "
        "that fit the model (--reward-set none --reward, --system-prompt-file)"
    )


def describe_plan(plan: Plan, why: str) -> list[tuple[str, str]]:
    """Return the plan as rows of a name and a text."""
    config, data = plan.config, plan.data
    bits = "4-bit NF4" if config.load_in_4bit else plan.placement.dtype
    trained, total = plan.trained_parameters, plan.parameters
    rounds = f"replaced by other prompts in up to {config.dynamic_sampling_rounds} rounds per step"
    return [
        ("settings", why),
        ("model", f"{config.model}: {total:,} parameters in {bits}, on {plan.placement.device}"),
        *describe_model(plan),
        ("backend", f"{plan.choice.backend} ({plan.choice.why_backend})"),
        ("rollout", f"{plan.choice.rollout} ({plan.choice.why_rollout})"),
        (
            "adapter",
            f"LoRA r {config.r}, alpha {config.lora_alpha}: {trained:,} parameters trained "
            f"({trained / total:.1%})",
        ),
        (
            "data",
            f"{config.dataset}: {len(data.train):,} to train on, {len(data.validation):,} to "
            "choose the best step",
        ),
        (
            "test",
            f"{data.test_name} ({data.test_split}): {len(data.test):,}, base and adapter, greedy",
        ),
        ("task", data.why_task),
        *(("", note) for note in data.notes),
        ("rewards", describe_rewards(plan)),
        *describe_start(config),
        (
            "steps",
            f"{plan.steps} of {config.prompts_per_step} prompts x {config.num_generations} "
            f"completions of up to {config.max_completion_length} tokens",
        ),
        *describe_filter(config),
        *([("dead groups", rounds)] if config.dynamic_sampling else []),
        ("update", describe_update(config)),
        *(("", note) for note in plan.notes),
        *(describe_memory(plan.memory) if plan.memory else [("memory", plan.unplanned)]),
        ("writes", str(plan.run_dir)),
    ]
