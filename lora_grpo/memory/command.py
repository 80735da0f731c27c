"""The command that plans memory: a run's flags in, a table or JSON out, before any weights load."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig, flag
from lora_grpo.data.problems import read_problems, take_example
from lora_grpo.data.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    has_system_role,
    read_system_prompt,
    render,
)
from lora_grpo.data.sources import BUILT_IN
from lora_grpo.machine.allocator import gives_back
from lora_grpo.machine.backend import Choice, choose_backend
from lora_grpo.machine.hardware import available_memory, find_gpu
from lora_grpo.machine.process import resident_peak, run_alone
from lora_grpo.memory.fit import MemoryPlan, as_record, gigabytes, plan_memory, print_plan
from lora_grpo.memory.shape import find_shape
from lora_grpo.memory.terms import GIB
from lora_grpo.policy.base import EMBEDDED, choose_template, resolve_model

NEEDED = ("tokenizer.json", "tokenizer_config.json")


class LightTokenizer:
    """As much of a transformers tokenizer as `render` and `count_tokens` ask for."""

    def __init__(self, folder: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / NEEDED[0]))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.settings = json.loads((folder / NEEDED[1]).read_text(encoding="utf-8"))
        self.name_or_path = str(folder)
        self.chat_template = find_template(folder, self.settings)
        self.environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: Any) -> str:
        special = {name: self.settings.get(name) or "" for name in ("bos_token", "eos_token")}
        template = self.environment.from_string(self.chat_template)  # compiled once, then cached
        return template.render(messages=messages, **special | settings)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        found = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in found]}


def find_template(folder: Path, settings: dict[str, Any]) -> str:
    """Return the chat template that training would render."""
    path, held = folder / "chat_template.jinja", settings.get("chat_template")
    if isinstance(held, list):
        held = {named["name"]: named["template"] for named in held}
    template = choose_template(folder, path.read_text(encoding="utf-8") if path.is_file() else held)
    if template is None:
        raise ValueError(f"{folder} has no chat template: use an instruct model")
    return template


def raise_exception(reason: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(reason)


def find_folder(config: TrainConfig) -> Path | None:
    """Return the model's folder if it, its tokenizer and the data are at hand without the Hub."""
    data = config.dataset == BUILT_IN or Path(config.dataset).expanduser().exists()
    if not data or not (config.model == EMBEDDED or Path(config.model).expanduser().is_dir()):
        return None
    folder = resolve_model(config.model, config.revision, weights=False)
    return folder if all((folder / name).is_file() for name in NEEDED) else None


def longest_prompt(config: TrainConfig) -> int | None:
    """Return the tokens of the longest training prompt that is kept; None where it is not local.

    Raises:
        FileNotFoundError, ValueError: data that cannot be read.
    """
    folder = find_folder(config)
    if folder is None:
        return None
    tokenizer = LightTokenizer(folder)
    columns = (config.question_column, config.answer_column)
    reading = read_problems(config.dataset, "train", *columns, "--dataset")
    problems, example = take_example(reading.problems, config.one_shot)
    system_prompt, system_role = (
        read_system_prompt(config.system_prompt_file),
        has_system_role(tokenizer),
    )
    style = PromptStyle(system_prompt, example, system_role)
    texts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    kept = [size for size in count_tokens(tokenizer, texts) if size <= config.max_prompt_length]
    return max(kept, default=None)


STEPS, STEPS_ON_HEAP = 2, 8  # the heap of a narrow model's run fills with holes for some steps
EVALUATED = 2
OWN_FLAGS = ("--json", "--no-json", "--measure", "--no-measure")
TRAIN = (
    "import sys; from lora_grpo.train.command import run; "
    "from lora_grpo.config.presets import parse_train_config; "
    "from lora_grpo.machine.terminal import run_command; "
    "sys.exit(run_command(lambda: run(*parse_train_config())))"
)


def shortened(arguments: Sequence[str], hidden_size: int) -> list[str]:
    """Return a run's flags, without this script's own, for few steps and little evaluation."""
    kept = [argument for argument in arguments if argument not in OWN_FLAGS]
    steps = STEPS if gives_back(hidden_size) else STEPS_ON_HEAP
    sizes = {"max-steps": steps, "num-eval-items": EVALUATED, "num-validation-items": 0}
    return [*kept, *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))]


def measure(arguments: Sequence[str], hidden_size: int) -> int:
    """Make the shortened run in a process of its own and return its peak resident bytes.

    Raises:
        FailedError: the run failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as folder:
        command = [sys.executable, "-c", TRAIN, *shortened(arguments, hidden_size)]
        command += ["--quiet", "--adapters-dir", folder, "--run-name", "measured"]
        return resident_peak(run_alone(command))


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
