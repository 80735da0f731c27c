"""What a merge leaves to read: `merge_report.json`, warnings, a table for the terminal, the card.

A plan and its proof go in; JSON values and text come out.
"""

import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.machine.folders import MERGED_FILE
from lora_grpo.policy.adapter import hash_weights

if TYPE_CHECKING:
    from lora_grpo.merge.inputs import MergePlan
    from lora_grpo.merge.prove import MergeProof
    from lora_grpo.results.card import CardNote

NOTABLE_LOSS = 0.25


def build_report(
    plan: "MergePlan", proof: "MergeProof", kind: str, reason: str, seconds: float
) -> dict[str, Any]:
    """Return `merge_report.json`: what was merged into what, each check, and the distances.

    `kind` is the proof that was run and `reason` why that one; without the logits proof the
    distances are None.
    """
    distances = asdict(proof.distances) if proof.distances else {}
    warnings = [plan.warning, warn_of_rounding(plan, proof)]
    return {
        "adapter": plan.record.folder.resolve().name,
        "adapter_sha256": hash_weights(plan.record.folder),
        "base": plan.base_name,
        "base_sha256": plan.base_sha256,
        "merged_into": plan.base,
        "dtype": plan.dtype,
        "num_tensors": len(plan.tensors),
        "num_adapted": len(plan.deltas),
        "proof": kind,
        "proof_reason": reason,
        "passed": not proof.failed,
        "checks": [asdict(check) for check in proof.checks],
        "adapter_kept": round(proof.kept, 4),
        "from_policy": distances.get("merged"),
        "rounding_noise_from_policy": distances.get("rounding_noise"),
        "bare_base_from_policy": distances.get("bare_base"),
        "from_4bit_policy": distances.get("from_4bit_policy"),
        "warnings": [warning for warning in warnings if warning],
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "peft", "safetensors")
        },
    }


def warn_of_rounding(plan: "MergePlan", proof: "MergeProof") -> str | None:
    """Return a warning where rounding undoes a good part of what the adapter does.

    An adapter whose changes lie below half an ulp of the base's weights leaves no trace in them.
    Measured in the logits where they are known: KL grows with the square of a change, so the root
    of the ratio is the share that is lost. Else measured in the weights.
    """
    lost, what = 1 - proof.kept, "the weights"
    if proof.distances is not None:
        if proof.distances.merged is None:
            return None
        effect, what = proof.distances.bare_base.mean_kl, "the model"
        moved = max(proof.distances.merged.mean_kl, 0.0)
        lost = math.sqrt(moved / effect) if effect > 0 else 1.0
    if lost <= NOTABLE_LOSS:
        return None
    finer = "serve the adapter itself" if plan.dtype == "float16" else "use --dtype float16"
    return (
        f"rounding to {plan.dtype} moves {what} {lost:.0%} as far as the adapter does, because "
        f"the adapter changes very little: train longer, or {finer}"
    )


def list_figures(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the report's distances, each with the words for what it is from what."""
    named = (
        ("merged model from base + adapter", "from_policy"),
        ("rounding noise from base + adapter", "rounding_noise_from_policy"),
        ("bare base from base + adapter", "bare_base_from_policy"),
        ("merged model from the 4-bit policy", "from_4bit_policy"),
    )
    return [(words, report[key]) for words, key in named if report[key]]


def build_table(report: dict[str, Any]) -> str:
    """Return the proof's figures for a terminal or a model card; a table where there are any."""
    tensors = next(check["detail"] for check in report["checks"] if check["name"] == "tensors")
    if not list_figures(report):
        return (
            f"tensors against base + delta: {tensors}; {report['adapter_kept']:.1%} of the "
            "adapter's change is in them (logits were not compared)"
        )
    lines = [
        "| distance of | max logit difference | mean KL (nats per token) | same greedy choice |",
        "| --- | --- | --- | --- |",
    ]
    for words, distance in list_figures(report):
        logits, kl = distance["max_logit_difference"], distance["mean_kl"]
        lines.append(f"| {words} | {logits:.3g} | {kl:.2e} | {distance['greedy_agreement']:.2%} |")
    return "\n".join(lines)


INTO = {
    "original": "the base's own weights",
    "dequantized": "the base's weights after NF4 and back, as the policy saw them in training",
}


def build_note(report: dict[str, Any], records: Path, folder: Path, name: str) -> "CardNote":
    """Return what a merge adds to the card of the model in `folder`, bound for a folder `name`."""
    from lora_grpo.results.card import CardNote, code
    from lora_grpo.results.records import read_records

    found = read_records(records, folder)
    base = f"{code(found.base.name)}, sha256 `{report['base_sha256'][:12]}`"
    summary = (
        f"The LoRA adapter {code(report['adapter'])} merged into {INTO[report['merged_into']]} "
        f"({base}) and stored in {report['dtype']}: {report['num_adapted']} of "
        f"{report['num_tensors']} tensors changed."
    )
    return CardNote(
        title=f"{report['adapter']}, merged",
        kind="merged",
        library_name="transformers",
        name=name,
        summary=summary,
        proof=describe_proof(report),
    )


def describe_proof(report: dict[str, Any]) -> str:
    """Return the distances and the checks in Markdown."""
    from lora_grpo.results.card import escape

    checks = [f"- {escape(check['name'])}: {escape(check['detail'])}" for check in report["checks"]]
    done = "Every tensor was read back and compared with base + delta in float32."
    if distance := report["from_policy"]:
        done += (
            " The folder was also loaded, and its logits compared with those of base + adapter in "
            f"float32 over {distance['positions']} positions."
        )
    return "\n\n".join(
        (f"{done} `{MERGED_FILE}` holds all of it.", build_table(report), "\n".join(checks))
    )
