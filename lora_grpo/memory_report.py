"""A memory plan in words: the table, the record for JSON, and the rows at the start of training."""

from typing import Any

from lora_grpo.config import TrainConfig
from lora_grpo.memory import Term
from lora_grpo.memory_plan import MemoryPlan, gigabytes

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
