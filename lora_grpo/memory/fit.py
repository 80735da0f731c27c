"""Settings with which a run fits its memory; the plan as a table, a record, and rows of text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lora_grpo.config.train_config import TrainConfig, flag
from lora_grpo.machine.backend import Choice
from lora_grpo.machine.hardware import GPU
from lora_grpo.memory.rollout import predict, sequences_in_flight, vllm_share
from lora_grpo.memory.shape import PUBLISHED, build_shape
from lora_grpo.memory.terms import GIB, Job, Prediction, Term

FEWEST_SEQUENCES = 4
SHARE_STEP = 10_000
UNPLANNED_SHARE = 0.5
BIGGEST = 3
PRICES = {
    "gradient_checkpointing": "the same gradient, each block's forward pass twice",
    "per_device_train_batch_size": "smaller products, expected a little slower",
    "gradient_accumulation_steps": "a step's completions and gradient stay the same",
    "vllm_max_num_seqs": "as many completions in flight; fewer than a step's are slower",
    "vllm_gpu_memory_utilization": "vLLM's weights, activations and full-length cache",
}
UNIT = "1 GB = 2**30 bytes, as on a card's label"


@dataclass(frozen=True)
class MemoryPlan:
    """A prediction that follows from a configuration and the settings changed in it.

    `settings` holds `TrainConfig` fields; `choices` one sentence for each change; `advice` what
    would fit where this does not.
    """

    job: Job
    prediction: Prediction
    budget_bytes: int
    settings: dict[str, Any]
    choices: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that the run holds at once."""
        return self.prediction.peak_bytes

    @property
    def fits(self) -> bool:
        """The peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes


def gigabytes(size: float) -> str:
    """Return bytes as GB in the sense of a card's label, 2**30 bytes."""
    return f"{size / GIB:.2f} GB"


def with_settings(job: Job, **settings: Any) -> Job:
    """Return the job with fields of its configuration changed."""
    return replace(job, config=replace(job.config, **settings))


def smaller_settings(job: Job, given: TrainConfig) -> Iterator[dict[str, Any]]:
    """Yield changes that can lower the peak, the cheapest first; none changes the gradient.

    They are gradient checkpointing, the next smaller micro-batch that divides a step, and half as
    many completions in flight, where vLLM's cache is not the user's to set.
    """
    config, step = job.config, job.config.completions_per_step
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    sizes = range(config.per_device_train_batch_size - 1, 0, -1)
    micro = next((size for size in sizes if step % size == 0), None)
    if micro and config.loss_type != "bnpo":
        yield {"per_device_train_batch_size": micro, "gradient_accumulation_steps": step // micro}
    count, fewest = sequences_in_flight(job), min(FEWEST_SEQUENCES, step)
    set_by_hand = given.vllm_max_num_seqs or given.vllm_gpu_memory_utilization
    if job.rollout == "vllm" and not set_by_hand and count > fewest:
        yield {"vllm_max_num_seqs": max(count // 2, fewest)}


def settle_vllm(job: Job) -> Job:
    """Give vLLM the share of the card and the sequences that the plan counts with."""
    if job.rollout != "vllm" or job.total_bytes is None:
        return job
    count, share = sequences_in_flight(job), job.config.vllm_gpu_memory_utilization
    if share is None:
        share = math.ceil(vllm_share(job, count) * SHARE_STEP) / SHARE_STEP
        if share >= 1:
            return job
    return with_settings(job, vllm_gpu_memory_utilization=share, vllm_max_num_seqs=count)


def settled_peak(job: Job) -> int:
    """Return the peak with vLLM's share as it would be set."""
    return predict(settle_vllm(job)).peak_bytes


def shrink(job: Job, budget_bytes: int) -> Job:
    """Make the cheapest change that lowers the peak, until the job fits or none does."""
    given, peak = job.config, settled_peak(job)
    while peak > budget_bytes:
        offers = (with_settings(job, **settings) for settings in smaller_settings(job, given))
        lower = next((offer for offer in offers if settled_peak(offer) < peak), None)
        if lower is None:
            break
        job, peak = lower, settled_peak(lower)
    return job


def plan_job(job: Job, budget_bytes: int) -> MemoryPlan:
    """Return the plan of a job within a budget, without advice."""
    settled, given = settle_vllm(shrink(job, budget_bytes)), vars(job.config)
    settings = {name: now for name, now in vars(settled.config).items() if given[name] != now}
    choices = (
        f"{flag(name)} {given[name]} -> {settings[name]}: {PRICES[name]}" for name in settings
    )
    return MemoryPlan(settled, predict(settled), budget_bytes, settings, tuple(choices))


def advise(job: Job, plan: MemoryPlan) -> tuple[str, ...]:
    """Return what would fit where this plan does not: flags, each checked by planning with them,
    and the memory that the model needs."""
    shapes = {name: build_shape(values, name) for name, values in PUBLISHED.items()}
    models = sorted(shapes.items(), key=lambda item: -item[1].parameters)
    candidates = {
        "--load-in-4bit": with_settings(job, load_in_4bit=True),
        "--loss-type dapo": with_settings(job, loss_type="dapo"),
        **{f"--model {name}": replace(job, shape=shape) for name, shape in models},
    }
    found = [
        f"{flags} fits"
        for flags, other in candidates.items()
        if plan_job(other, plan.budget_bytes).fits
    ]
    where = "a card with" if job.device == "cuda" else "a machine with"
    found.append(f"{where} {math.ceil(2 * plan.peak_bytes / GIB) / 2:g} GB free fits this model")
    return tuple(found)


def plan_memory(job: Job, budget_bytes: int) -> MemoryPlan:
    """Choose the cheapest settings with which a run fits, and predict its peak."""
    plan = plan_job(job, budget_bytes)
    return plan if plan.fits else replace(plan, advice=advise(job, plan))


def settle_unplanned(
    config: TrainConfig, choice: Choice, gpu: GPU | None, reason: str
) -> tuple[dict[str, Any], str]:
    """Return the settings of a run whose memory cannot be planned, and a sentence about it.

    Raises:
        ValueError: a --gpu-memory that nothing here could keep to.
    """
    limit = config.gpu_memory
    if gpu is None or (choice.rollout != "vllm" and limit is None):
        return {}, f"not planned: {reason}"
    if choice.rollout != "vllm":
        raise ValueError(
            f"--gpu-memory {limit:g} cannot be kept to: {reason}: leave it out, and take a small "
            "--per-device-train-batch-size and --gradient-checkpointing"
        )
    share = config.vllm_gpu_memory_utilization
    if share is None:
        usable = min((limit or math.inf) * GIB, gpu.total_bytes)
        share = round(UNPLANNED_SHARE * usable / gpu.total_bytes, 3)
    limited = "" if limit is None else "; --gpu-memory limits vLLM alone"
    sentence = f"vLLM gets {share:.3g} of the card (--vllm-gpu-memory-utilization)"
    return {"vllm_gpu_memory_utilization": share}, f"not planned, {sentence}{limited}: {reason}"


def as_record(plan: MemoryPlan, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return what `--json` prints."""
    job, prediction = plan.job, plan.prediction
    terms = [("always", term) for term in prediction.always]
    terms += [(phase.name, term) for phase in prediction.phases for term in phase.terms]
    return {
        "model": job.config.model,
        "parameters": job.shape.parameters,
        "device": job.device,
        "dtype": job.dtype,
        "backend": job.backend,
        "rollout": job.rollout,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": prediction.fullest.name,
        "fits": plan.fits,
        "terms": [{"phase": phase, **vars(term)} for phase, term in terms if term.bytes],
        "settings": plan.settings,
        "choices": list(plan.choices),
        "advice": list(plan.advice),
        "notes": list(notes),
    }


def print_terms(terms: tuple[Term, ...]) -> None:
    for term in terms:
        if term.bytes:
            print(f"  {term.name:<26} {gigabytes(term.bytes):>9}  {term.why}")


def print_plan(plan: MemoryPlan, notes: tuple[str, ...]) -> None:
    """Print the terms phase by phase, the choices, and the verdict."""
    job, prediction = plan.job, plan.prediction
    print(
        f"{job.config.model}: {job.shape.parameters:,} parameters, {job.device}, {job.dtype}, "
        f"{job.backend}, {job.rollout}; {UNIT}"
    )
    for note in notes:
        print(f"  {note}")
    print("always")
    print_terms(prediction.always)
    for phase in prediction.phases:
        mark = "  <- the peak" if phase is prediction.fullest else ""
        print(f"{phase.name}: {gigabytes(phase.bytes)} more{mark}")
        print_terms(phase.terms)
    if plan.choices:
        print("chosen", *plan.choices, sep="\n  ")
    print(verdict(plan), *plan.advice, sep="\n  ")


def verdict(plan: MemoryPlan) -> str:
    """Return the sentence that says whether the run fits."""
    peak, budget = f"peak {gigabytes(plan.peak_bytes)}", gigabytes(plan.budget_bytes)
    if plan.fits:
        return f"fits: {peak} of {budget}"
    bnpo = plan.job.config.loss_type == "bnpo"
    bound = " (--loss-type bnpo allows no smaller micro-batch)" if bnpo else ""
    return f"does not fit: {peak} even with the smallest settings, budget {budget}{bound}; options:"


def describe_memory(plan: MemoryPlan) -> list[tuple[str, str]]:
    """Return the plan as two to four rows of the table at the start of training."""
    fullest = plan.prediction.fullest
    terms = (*plan.prediction.always, *fullest.terms)
    biggest = sorted(terms, key=lambda term: -term.bytes)[:BIGGEST]
    parts = ", ".join(f"{term.name} {gigabytes(term.bytes)}" for term in biggest)
    rows = [("memory", f"{verdict(plan)}, in {fullest.name}: {parts}")]
    return rows + [("", choice) for choice in plan.choices[-BIGGEST:]]
