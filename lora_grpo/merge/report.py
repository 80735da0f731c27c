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
DISTANCES = {
    "from_policy": "merged model from base + adapter",
    "rounding_noise_from_policy": "rounding noise from base + adapter",
    "bare_base_from_policy": "bare base from base + adapter",
    "from_4bit_policy": "merged model from the 4-bit policy",
}
INTO = {
    "original": "the base's own weights",
    "dequantized": "the base's weights after NF4 and back, as the policy saw them in training",
}


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


def build_table(report: dict[str, Any]) -> str:
    """Return the proof's figures for a terminal or a model card; a table where there are any."""
    tensors = next(check["detail"] for check in report["checks"] if check["name"] == "tensors")
    rows = []
    for key, words in DISTANCES.items():
        if found := report[key]:
            logits, kl = found["max_logit_difference"], found["mean_kl"]
            rows.append(f"| {words} | {logits:.3g} | {kl:.2e} | {found['greedy_agreement']:.2%} |")
    if not rows:
        return (
            f"tensors against base + delta: {tensors}; {report['adapter_kept']:.1%} of the "
            "adapter's change is in them (logits were not compared)"
        )
    head = "| distance of | max logit difference | mean KL (nats per token) | same greedy choice |"
    return "\n".join((head, "| --- | --- | --- | --- |", *rows))


def build_note(plan: "MergePlan", report: dict[str, Any], folder: Path, name: str) -> "CardNote":
    """Return what a merge adds to the card of the model in `folder`, bound for a folder `name`."""
    from lora_grpo.results.card import CardNote, code, escape
    from lora_grpo.results.records import find_base

    base = f"{code(find_base(plan.record, folder).name)}, sha256 `{plan.base_sha256[:12]}`"
    done = "Every tensor was read back and compared with base + delta in float32."
    if distance := report["from_policy"]:
        done += (
            " The folder was also loaded, and its logits compared with those of base + adapter in "
            f"float32 over {distance['positions']} positions."
        )
    checks = [f"- {escape(check['name'])}: {escape(check['detail'])}" for check in report["checks"]]
    return CardNote(
        title=f"{report['adapter']}, merged",
        kind="merged",
        library_name="transformers",
        name=name,
        summary=f"The LoRA adapter {code(report['adapter'])} merged into {INTO[plan.base]} "
        f"({base}) and stored in {plan.dtype}: {len(plan.deltas)} of {len(plan.tensors)} tensors "
        "changed.",
        proof="\n\n".join(
            (f"{done} `{MERGED_FILE}` holds all of it.", build_table(report), "\n".join(checks))
        ),
    )
