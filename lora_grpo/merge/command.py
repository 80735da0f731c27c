"""An adapter becomes a plain 16-bit model folder that is proven to be base + adapter.

Check, write, prove, and only then appear under the final name. Nothing heavy is imported here, so
that `--help` and a wrong flag answer at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from lora_grpo.machine.terminal import FailedError

if TYPE_CHECKING:
    from lora_grpo.merge.inputs import MergePlan
    from lora_grpo.proof.reference import Reference

Report = Callable[[str], None]
say = partial(print, flush=True)


@dataclass(frozen=True)
class MergeConfig:
    """Merge a LoRA adapter into its base as a plain 16-bit model, proven to be the same policy.

    An adapter trained on a 4-bit base is merged into the original 16-bit weights.
    """

    adapter_dir: Positional[Annotated[Path, arg(metavar="ADAPTER_DIR")]]
    """An adapter directory, such as adapters/<run>; it remembers its base."""
    output_dir: Path | None = None
    """Folder to write, which must not exist; by default merged/<name of the adapter directory>."""
    model: str | None = None
    """Base to merge into, a Hub id or a folder; by default the one that the adapter remembers."""
    base: Literal["original", "dequantized"] = "original"
    """Weights to merge into: the original ones, or those that the policy saw in 4-bit training."""
    dtype: Literal["bfloat16", "float16"] | None = None
    """Type to store; by default float16 if the base is stored in it, else bfloat16."""
    proof: Literal["tensors", "logits"] | None = None
    """tensors compares every stored tensor with base + delta; logits also loads both models in
    float32 and compares what they compute; by default logits if the memory suffices."""
    num_prompts: int = 8
    """Prompts to compare the logits on, from eval_items.jsonl or built in."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"--num-prompts must be at least 1, got {self.num_prompts}")
        if not self.adapter_dir.is_dir():
            raise ValueError(
                f"ADAPTER_DIR {self.adapter_dir} is no directory: give one that train_lora.py "
                "wrote, such as adapters/<run>"
            )
        if self.target.exists():
            raise ValueError(
                f"--output-dir {self.target} exists already and is never overwritten: choose "
                "another or move it away"
            )

    @property
    def target(self) -> Path:
        """The folder to write."""
        return self.output_dir or Path("merged") / self.adapter_dir.resolve().name


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and the proof that it is the policy.

    `reference` holds the merged model's logits where the proof computed them.
    """

    folder: Path
    report: dict[str, Any]
    reference: "Reference | None" = None

    @property
    def table(self) -> str:
        """The figures of the proof as text."""
        from lora_grpo.merge.report import build_table

        return build_table(self.report)


class MergeProofError(FailedError):
    """The merged folder was not what it should be and is gone; the message names the failures."""


def merge_adapter(
    config: MergeConfig, report: Report = say, plan: "MergePlan | None" = None
) -> MergeResult:
    """Merge an adapter into its base and prove the result before it appears.

    `plan` is what `plan_merge` returned for this config, where the caller has it already.

    Raises:
        ValueError, OSError: what was given cannot be merged; the message says what to do.
        MergeProofError: the proof failed; `<output-dir>.failed.json` says how.
    """
    from lora_grpo.machine.files import check_room, staged_directory, write_json
    from lora_grpo.machine.folders import MERGED_FILE
    from lora_grpo.merge.inputs import SMALL_FILES, plan_merge
    from lora_grpo.merge.prove import choose_proof, prove_merge
    from lora_grpo.merge.report import build_note, build_report
    from lora_grpo.merge.write import write_side_files, write_weights
    from lora_grpo.results.card import write_model_card

    started = time.perf_counter()
    if plan is None:
        plan = plan_merge(config.adapter_dir, config.model, config.base, config.dtype)
    check_room(config.target, plan.nbytes + SMALL_FILES, "--output-dir")
    kind, reason = choose_proof(config.proof, plan.nbytes)
    report(
        f"merging {len(plan.deltas)} of {len(plan.tensors)} tensors of {plan.base_name} in "
        f"{plan.dtype}, {plan.nbytes / 1e9:.2f} GB"
    )
    report(f"proof: {kind} ({reason})")
    with staged_directory(config.target) as staged:
        write_weights(plan, staged)
        write_side_files(plan, staged)
        proof = prove_merge(plan, staged, config.num_prompts, report, kind)
        found = build_report(plan, proof, kind, reason, time.perf_counter() - started)
        for warning in found["warnings"]:
            report(f"warning: {warning}")
        if proof.failed:
            path = failure_report(config.target)
            write_json(path, found)
            reasons = "; ".join(f"{check.name} ({check.detail})" for check in proof.failed)
            raise MergeProofError(
                f"the merged model is not base + adapter, it failed: {reasons}. Nothing was kept "
                f"but {path}, which says more"
            )
        write_json(staged / MERGED_FILE, found)
        note = build_note(plan, found, staged, config.target.name)
        write_model_card(staged, config.adapter_dir, note)
    return MergeResult(config.target, found, proof.reference)


def failure_report(target: Path) -> Path:
    """Return the file that says how the proof of a folder failed, numbered after earlier ones."""
    path, number = target.with_name(f"{target.name}.failed.json"), 1
    while path.exists():
        number += 1
        path = target.with_name(f"{target.name}.failed.{number}.json")
    return path
