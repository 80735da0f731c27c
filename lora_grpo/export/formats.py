"""The formats one after the other: all checked before the merge, then written from one merge and
proven."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.export.source import HERE, ExportedFormat, Say, Source, copy_companions
from lora_grpo.merge.command import (
    MergeConfig,
    MergeProofError,
    MergeResult,
    failure_report,
    merge_adapter,
)
from lora_grpo.proof.checks import Check

if TYPE_CHECKING:
    from lora_grpo.export.config import ExportConfig
    from lora_grpo.proof.reference import Reference

COMPRESSED = ("fp8", "int8", "w4a16")


def check_formats(config: "ExportConfig", source: Source) -> None:
    """Raise a ValueError or an OSError for a format that cannot be written of this model here."""
    for name in config.formats:
        if name in ("gguf", "ollama", "gguf-adapter"):
            from lora_grpo.export.gguf.files import check_gguf

            check_gguf(source, () if name == "gguf-adapter" else config.quants)
        if name == "ollama":
            from lora_grpo.export.ollama import check_ollama

            check_ollama(source, config.quants)
        elif name in COMPRESSED:
            from lora_grpo.export.compressed import check_compressed

            check_compressed(source.merged, name)


def write_formats(
    config: "ExportConfig", source: Source, staged: Path, say: Say
) -> dict[str, ExportedFormat]:
    """Merge once, then write and prove each format; the merge stays only where it is a format."""
    from lora_grpo.export.accuracy import add_accuracy
    from lora_grpo.proof.reference import observe_merged

    exported: dict[str, ExportedFormat] = {}
    others = [name for name in config.formats if name != "safetensors"]
    merge = reference = None
    if source.plan:
        merged = staged / ("safetensors" if "safetensors" in config.formats else ".merged")
        merge = merge_for(config, source, merged, say)
        source, reference = replace(source, merged=merged), merge.reference
        exported["safetensors"] = describe_merge(merge)
    folders = {name: config.folder(staged, name) for name in others}
    if others and reference is None:
        reference = observe_merged(
            source.merged, source.record.records, source.style, config.num_prompts
        )
    for name, folder in folders.items():
        say(f"writing {name}")
        folder.mkdir(exist_ok=True)
        copy_companions(source, folder)
        exported[name] = write_format(name, config.quants, source, folder, reference, say)
    exported = {name: exported[name] for name in config.formats}
    if config.num_items is not None and not any(one.failed for one in exported.values()):
        folders["safetensors"] = source.merged
        exported = add_accuracy(config, source, exported, folders, say)
    if merge and not others:  # the only format stands in the export's own folder
        for path in list(source.merged.iterdir()):
            path.rename(staged / path.name)
    if merge and not ("safetensors" in config.formats and others):
        shutil.rmtree(source.merged)
    return exported


def merge_for(config: "ExportConfig", source: Source, merged: Path, say: Say) -> MergeResult:
    """Merge into a folder of the export; a failed proof's report is kept beside the export."""
    settings = MergeConfig(config.source, merged, config.model, config.base)
    try:
        return merge_adapter(replace(settings, num_prompts=config.num_prompts), say, source.plan)
    except MergeProofError as error:
        said, kept = merged.with_name(f"{merged.name}.failed.json"), failure_report(config.target)
        shutil.copyfile(said, kept)
        raise MergeProofError(str(error).replace(str(said), str(kept))) from error


def describe_merge(result: MergeResult) -> ExportedFormat:
    """Return the merge's own proof as that of the format `safetensors`."""
    checks = tuple(Check(**check) for check in result.report["checks"])
    size = sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    figures = {"bytes": size, "from_policy": result.report["from_policy"]}
    return ExportedFormat(checks, figures, (("vllm", "serve", HERE),))


def write_format(
    name: str,
    quants: tuple[str, ...],
    source: Source,
    folder: Path,
    reference: "Reference",
    say: Say,
) -> ExportedFormat:
    """Write one format into its folder, and prove it."""
    if name == "gguf":
        from lora_grpo.export.gguf.files import write_gguf

        return write_gguf(source, folder, quants, reference, say)
    if name == "gguf-adapter":
        from lora_grpo.export.gguf.files import write_gguf_adapter

        return write_gguf_adapter(source, folder, reference, say)
    if name == "ollama":
        from lora_grpo.export.ollama import write_ollama

        return write_ollama(source, folder, quants[0], reference, say)
    if name == "bnb-4bit":
        from lora_grpo.export.bnb import write_bnb

        return write_bnb(source, folder, reference, say)
    from lora_grpo.export.compressed import write_compressed

    return write_compressed(source, folder, name, reference, say)
