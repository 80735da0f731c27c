"""The formats one after the other: all checked before the merge, then written from one merge and
proven."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.export.report import SYSTEM_PROMPT
from lora_grpo.export.source import HERE, Outcome, Request, Source
from lora_grpo.merge.command import (
    MergeConfig,
    MergeProofError,
    MergeResult,
    Report,
    free_name,
    merge_adapter,
)
from lora_grpo.merge.write import TOKENIZER_FILES
from lora_grpo.proof.checks import Check

if TYPE_CHECKING:
    from lora_grpo.export.config import ExportConfig
    from lora_grpo.proof.reference import Reference

COMPRESSED = ("fp8", "int8", "w4a16")


def check_formats(config: "ExportConfig", request: Request) -> None:
    """Raise a ValueError or an OSError for a format that cannot be written of this model here."""
    for name in config.formats:
        if name in ("gguf", "ollama", "gguf-adapter"):
            from lora_grpo.export.gguf.files import check_gguf

            check_gguf(request, () if name == "gguf-adapter" else config.quants)
        if name == "ollama":
            from lora_grpo.export.ollama import check_ollama

            check_ollama(request, config.quants)
        elif name in COMPRESSED:
            from lora_grpo.export.compressed import check_compressed

            check_compressed(request.model_folder, name)


def write_formats(
    config: "ExportConfig", request: Request, staged: Path, report: Report
) -> dict[str, Outcome]:
    """Merge once, then write and prove each format; the merge stays only where it is a format."""
    from lora_grpo.export.accuracy import Accuracy
    from lora_grpo.proof.reference import observe_merged

    merged, merge = request.model_folder, None
    if request.adapter_dir is not None:
        merged = staged / ("safetensors" if "safetensors" in config.formats else ".merged")
        merge = merge_for(config, request, merged, report)
    source = Source(
        request.name, merged, request.adapter_dir, request.records, request.style,
        request.model_folder if merge else None,
    )  # fmt: skip
    accuracy = Accuracy(source, config.num_items, config.batch_size, report)
    outcomes: dict[str, Outcome] = {}
    if merge and "safetensors" in config.formats:
        outcomes["safetensors"] = accuracy.add(describe_merge(merge), "safetensors", merged)
    others = [name for name in config.formats if name != "safetensors"]
    seen = merge.reference if merge else None
    if others and seen is None:
        seen = observe_merged(source.merged, source.records, source.style, config.num_prompts)
    for name in others:
        report(f"writing {name}")
        folder = config.folder(staged, name)
        folder.mkdir(exist_ok=True)
        copy_companions(source, folder)
        written = write_format(name, config.quants, source, folder, seen, report)
        outcomes[name] = accuracy.add(written, name, folder)
    if merge and not (others and "safetensors" in config.formats):
        settle_merge(merged, staged, keep=not others)
    return {name: outcomes[name] for name in config.formats}


def merge_for(
    config: "ExportConfig", request: Request, merged: Path, report: Report
) -> MergeResult:
    """Merge into a folder of the export; a failed proof's report is kept beside the export."""
    settings = MergeConfig(request.adapter_dir, merged, config.model, config.base)
    try:
        return merge_adapter(
            replace(settings, num_prompts=config.num_prompts), report, request.plan
        )
    except MergeProofError as error:
        said = merged.with_name(f"{merged.name}.failed.json")
        kept = free_name(config.target.with_name(f"{config.target.name}.failed.json"))
        shutil.copyfile(said, kept)
        raise MergeProofError(str(error).replace(str(said), str(kept))) from error


def describe_merge(result: MergeResult) -> Outcome:
    """Return the merge's own proof as that of the format `safetensors`."""
    checks = tuple(Check(**check) for check in result.report["checks"])
    size = sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    figures = {"bytes": size, "from_policy": result.report["from_policy"]}
    return Outcome(checks, figures, (("vllm", "serve", HERE),))


def write_format(
    name: str,
    quants: tuple[str, ...],
    source: Source,
    folder: Path,
    seen: "Reference",
    report: Report,
) -> Outcome:
    """Write one format into its empty folder, and prove it."""
    if name == "gguf":
        from lora_grpo.export.gguf.files import write_gguf

        return write_gguf(source, folder, quants, seen, report)
    if name == "gguf-adapter":
        from lora_grpo.export.gguf.files import write_gguf_adapter

        return write_gguf_adapter(source, folder, seen, report)
    if name == "ollama":
        from lora_grpo.export.ollama import write_ollama

        return write_ollama(source, folder, quants[0], seen, report)
    if name == "bnb-4bit":
        from lora_grpo.export.bnb import write_bnb

        return write_bnb(source, folder, seen, report)
    from lora_grpo.export.compressed import write_compressed

    return write_compressed(source, folder, name, seen, report)


def copy_companions(source: Source, folder: Path) -> None:
    """Put tokenizer, template, generation config, licence and system prompt beside the weights."""
    names = [*TOKENIZER_FILES, "generation_config.json"]
    names += [path.name for path in source.merged.glob("LICENSE*")]
    for name in names:
        if (source.merged / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source.merged / name, folder / name)
    (folder / SYSTEM_PROMPT).write_text(source.style.system_prompt, encoding="utf-8")


def settle_merge(merged: Path, staged: Path, keep: bool) -> None:
    """Put the merge where a single format stands, or remove it."""
    if keep:
        for path in list(merged.iterdir()):
            path.rename(staged / path.name)
    shutil.rmtree(merged)
