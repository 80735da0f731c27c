"""A memory plan in words: the table, the record for JSON, and the rows at the start of training."""

import math
from dataclasses import dataclass, replace
from typing import Any

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.machine.backend import Choice
from lora_grpo.machine.hardware import GPU
from lora_grpo.memory.rollout import predict, sequences_in_flight, vllm_share
from lora_grpo.memory.shape import PUBLISHED, ModelShape, build_shape
from lora_grpo.memory.terms import GIB, Job, Prediction, Term

FEWEST_SEQUENCES = 4
LARGEST_CARD = 640  # half GiB steps to look for a card that would do
SHARE_STEP = 10_000
UNPLANNED_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """A prediction that follows from a configuration and the settings changed in it.

    `settings` holds `TrainConfig` fields; `choices` one sentence for each change; `advice` what
    would fit where this does not.
    """

    job: Job
    prediction: Prediction
    budget_bytes: int | None
    settings: dict[str, Any]
    choices: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        """What there is at the peak."""
        return self.prediction.terms

    @property
    def peak_bytes(self) -> int:
        """The most that the run holds at once."""
        return self.prediction.peak_bytes

    @property
    def fits(self) -> bool:
        """The peak is within the budget."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes


Offer = tuple[Job, str] | None


def gigabytes(size: float) -> str:
    """Return bytes as GB in the sense of a card's label, 2**30 bytes."""
    return f"{size / GIB:.2f} GB"


def with_settings(job: Job, **settings: Any) -> Job:
    """Return the job with fields of its configuration changed."""
    return replace(job, config=replace(job.config, **settings))


def arithmetic_shares(shape: ModelShape) -> tuple[float, float]:
    """Return what the blocks' and the output layer's forward pass are of a LoRA update.

    An update is one forward pass and one backward pass for the inputs alone, as much again.
    """
    whole = 2 * (shape.linear_parameters + shape.embedding_parameters)
    return shape.linear_parameters / whole, shape.embedding_parameters / whole


def checkpoint_gradients(job: Job, given: TrainConfig) -> Offer:
    """Keep each block's input alone, and run its forward pass again in the backward pass."""
    if job.config.gradient_checkpointing:
        return None
    more = arithmetic_shares(job.shape)[0]
    sentence = f"gradient checkpointing: the same gradient, {more:.0%} more arithmetic in an update"
    return with_settings(job, gradient_checkpointing=True), sentence


def shrink_micro_batch(job: Job, given: TrainConfig) -> Offer:
    """Take the next smaller micro-batch that divides the completions of a step."""
    config, step = job.config, job.config.completions_per_step
    smaller = (n for n in range(config.per_device_train_batch_size - 1, 0, -1) if step % n == 0)
    micro = None if config.loss_type == "bnpo" else next(smaller, None)
    if micro is None:
        return None
    parts = step // micro
    sentence = (
        f"micro-batch {given.per_device_train_batch_size} -> {micro}, accumulation "
        f"{given.gradient_accumulation_steps} -> {parts}: the same {step} completions and gradient "
        "in smaller products, expected a little slower"
    )
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": parts}
    return with_settings(job, **sizes), sentence


def lower_sequences(job: Job, given: TrainConfig) -> Offer:
    """Take half as many completions in flight, where vLLM's cache is not the user's to set."""
    now, step = sequences_in_flight(job), job.config.completions_per_step
    fewest = min(FEWEST_SEQUENCES, step)
    set_by_hand = given.vllm_max_num_seqs or given.vllm_gpu_memory_utilization
    if not job.has_vllm or set_by_hand or now <= fewest:
        return None
    count = max(now // 2, fewest)
    sentence = (
        f"{count} of {step} completions in flight: {math.ceil(step / count)} waves instead of one, "
        "expected slower generation"
    )
    return with_settings(job, vllm_max_num_seqs=count), sentence


MOVES = (checkpoint_gradients, shrink_micro_batch, lower_sequences)


def settled_peak(job: Job) -> int:
    """Return the peak with vLLM's share as it would be set."""
    return predict(settle_vllm(job)[0]).peak_bytes


def shrink(job: Job, budget_bytes: int | None) -> tuple[Job, tuple[str, ...]]:
    """Make the cheapest change that lowers the peak, until the job fits or none does.

    Returns the job and one sentence for each kind of change, with what it saves.
    """
    given, peak = job.config, settled_peak(job)
    sentences: dict[str, str] = {}
    saved: dict[str, int] = {}
    while budget_bytes is not None and peak > budget_bytes:
        for move in MOVES:
            offer = move(job, given)
            lower = settled_peak(offer[0]) if offer else peak
            if offer and lower < peak:
                saved[move.__name__] = saved.get(move.__name__, 0) + peak - lower
                job, sentences[move.__name__] = offer
                peak = lower
                break
        else:
            break
    return job, tuple(
        f"{sentence}; saves {gigabytes(saved[name])}" for name, sentence in sentences.items()
    )


def settle_vllm(job: Job) -> tuple[Job, tuple[str, ...]]:
    """Give vLLM the share of the card and the sequences that the plan counted with."""
    config = job.config
    if not job.has_vllm or job.device != "cuda" or job.total_bytes is None:
        return job, ()
    count = sequences_in_flight(job)
    if config.vllm_gpu_memory_utilization is None:
        exact = vllm_share(job, count, job.total_bytes)
        share = math.ceil(exact * SHARE_STEP) / SHARE_STEP
        if share >= 1:
            return job, ()
        job = with_settings(job, vllm_gpu_memory_utilization=share, vllm_max_num_seqs=count)
        weights = "weights (which the update shares), " if job.shares_weights else "weights, "
        return job, (
            f"vLLM's share of the card {share:.2f}: its {weights}activations and the cache of "
            f"{count} completions at full length",
        )
    return with_settings(job, vllm_max_num_seqs=count), ()


def changed(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """Return the fields that differ, with their new values."""
    return {name: value for name, value in vars(after).items() if getattr(before, name) != value}


def plan_job(job: Job, budget_bytes: int | None) -> MemoryPlan:
    """Return the plan of a job within a budget, without advice."""
    smaller, choices = shrink(job, budget_bytes)
    settled, vllm = settle_vllm(smaller)
    return MemoryPlan(
        job=settled,
        prediction=predict(settled),
        budget_bytes=budget_bytes,
        settings=changed(job.config, settled.config),
        choices=(*choices, *vllm),
    )


def smallest_budget(job: Job) -> int | None:
    """Return the smallest card, in steps of half a GB, that the job fits."""
    for halves in range(1, LARGEST_CARD):
        size = halves * GIB // 2
        if plan_job(replace(job, total_bytes=size), size).fits:
            return size
    return None


def advise(job: Job, budget_bytes: int) -> tuple[str, ...]:
    """Return what would fit, each checked by planning it."""
    found = []
    quantised = with_settings(job, load_in_4bit=True)
    if not job.config.load_in_4bit and plan_job(quantised, budget_bytes).fits:
        found.append("--load-in-4bit fits")
    other = with_settings(job, loss_type="dapo")
    if job.config.loss_type == "bnpo" and plan_job(other, budget_bytes).fits:
        found.append("--loss-type dapo fits: bnpo allows no smaller micro-batch")
    shapes = {name: build_shape(values, name) for name, values in PUBLISHED.items()}
    for name, shape in sorted(shapes.items(), key=lambda item: -item[1].parameters):
        smaller = shape.parameters < job.shape.parameters
        if smaller and plan_job(replace(job, shape=shape), budget_bytes).fits:
            found.append(f"--model {name} fits")
            break
    size = smallest_budget(job)
    if size is not None:
        where = "a card with" if job.device == "cuda" else "a machine with"
        found.append(f"{where} {size / GIB:g} GB free fits this model")
    return tuple(found)


def plan_memory(
    config: TrainConfig,
    shape: ModelShape,
    choice: Choice,
    device: str,
    dtype: str,
    budget_bytes: int | None,
    total_bytes: int | None = None,
    prompt_length: int | None = None,
    gives_back: bool = True,
) -> MemoryPlan:
    """Choose the cheapest settings with which a run fits, and predict its peak.

    `total_bytes` is the whole card, the budget by default; `prompt_length` the longest prompt in
    tokens, `max_prompt_length` by default; `gives_back` what `allocator` answered. Without a budget
    nothing is changed but what vLLM needs to be told.
    """
    longest = min(prompt_length or config.max_prompt_length, config.max_prompt_length)
    total = total_bytes or budget_bytes
    backend, rollout = choice.backend, choice.rollout
    job = Job(shape, config, backend, rollout, device, dtype, longest, total, gives_back)
    plan = plan_job(job, budget_bytes)
    if plan.fits or budget_bytes is None:
        return plan
    return replace(plan, advice=advise(job, budget_bytes))


def settle_unplanned(
    config: TrainConfig, choice: Choice, gpu: GPU | None, reason: str
) -> tuple[dict[str, Any], str]:
    """Return the settings of a run whose memory cannot be planned, and a sentence about it.

    Raises:
        ValueError: a --gpu-memory that nothing here could keep to.
    """
    if gpu is None:
        return {}, f"not planned: {reason}"
    if choice.rollout != "vllm":
        if config.gpu_memory is not None:
            raise ValueError(
                f"--gpu-memory {config.gpu_memory:g} cannot be kept to: {reason}: leave it out, "
                "and take a small --per-device-train-batch-size and --gradient-checkpointing"
            )
        return {}, f"not planned: {reason}"
    share = config.vllm_gpu_memory_utilization
    if share is None:
        limit = min((config.gpu_memory or math.inf) * GIB, gpu.total_bytes)
        share = round(UNPLANNED_SHARE * limit / gpu.total_bytes, 3)
    limited = "" if config.gpu_memory is None else "; --gpu-memory limits vLLM alone"
    sentence = f"vLLM gets {share:.3g} of the card (--vllm-gpu-memory-utilization)"
    return {"vllm_gpu_memory_utilization": share}, f"not planned, {sentence}{limited}: {reason}"


BIGGEST = 3
UNIT = "1 GB = 2**30 bytes, as on a card's label"


def as_record(config: TrainConfig, plan: MemoryPlan, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return what `--json` prints."""
    terms = [("always", term) for term in plan.prediction.always]
    terms += [(phase.name, term) for phase in plan.prediction.phases for term in phase.terms]
    return {
        "model": config.model,
        "parameters": plan.job.shape.parameters,
        "device": plan.job.device,
        "dtype": plan.job.dtype,
        "backend": plan.job.backend,
        "rollout": plan.job.rollout,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.prediction.fullest.name,
        "fits": plan.fits,
        "terms": [
            {"phase": phase, "name": term.name, "bytes": term.bytes, "why": term.why}
            for phase, term in terms
        ],
        "settings": plan.settings,
        "choices": list(plan.choices),
        "advice": list(plan.advice),
        "notes": list(notes),
    }


def term_line(term: Term) -> str:
    return f"  {term.name:<26} {gigabytes(term.bytes):>9}  {term.why}"


def print_plan(config: TrainConfig, plan: MemoryPlan, notes: tuple[str, ...]) -> None:
    """Print the terms phase by phase, the choices, and the verdict."""
    job, prediction = plan.job, plan.prediction
    print(
        f"{config.model}: {job.shape.parameters:,} parameters, {job.device}, {job.dtype}, "
        f"{job.backend}, {job.rollout}; {UNIT}"
    )
    for note in notes:
        print(f"  {note}")
    print("always")
    for term in prediction.always:
        print(term_line(term))
    for phase in prediction.phases:
        mark = "  <- the peak" if phase is prediction.fullest else ""
        print(f"{phase.name}: {gigabytes(phase.bytes)} more{mark}")
        for term in phase.terms:
            print(term_line(term))
    if plan.choices:
        print("chosen")
    for choice in plan.choices:
        print(f"  {choice}")
    print(verdict(plan))
    for advice in plan.advice:
        print(f"  {advice}")


def verdict(plan: MemoryPlan) -> str:
    """Return the sentence that says whether the run fits."""
    peak = f"peak {gigabytes(plan.peak_bytes)}"
    if plan.budget_bytes is None:
        return peak
    if plan.fits:
        return f"fits: {peak} of {gigabytes(plan.budget_bytes)}"
    bound = " (--loss-type bnpo allows no smaller micro-batch)" * (
        plan.job.config.loss_type == "bnpo"
    )
    return (
        f"does not fit: {peak} even with the most frugal settings, the budget is "
        f"{gigabytes(plan.budget_bytes)}{bound}; what would:"
    )


def describe_memory(plan: MemoryPlan) -> list[tuple[str, str]]:
    """Return the plan as two to four rows of the table at the start of training."""
    fullest = plan.prediction.fullest.name
    biggest = sorted(plan.terms, key=lambda term: -term.bytes)[:BIGGEST]
    parts = ", ".join(f"{term.name} {gigabytes(term.bytes)}" for term in biggest)
    rows = [("memory", f"{verdict(plan)}, in {fullest}: {parts}")]
    rows += [("", choice) for choice in plan.choices[-BIGGEST:]]
    return rows
