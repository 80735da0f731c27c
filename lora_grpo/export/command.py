"""An adapter becomes the formats that people run, each loaded again and compared with the merged
model.

Check, merge once, write and prove every format, and only then appear under the final name, with
a report and a card in each. Nothing heavy is imported here, so that `--help` and a wrong flag
answer at once.
"""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.export.config import ExportConfig
from lora_grpo.machine.files import check_room, staged_directory, write_json
from lora_grpo.machine.folders import EXPORT_FILE
from lora_grpo.machine.terminal import FailedError
from lora_grpo.merge.command import failure_report, say

if TYPE_CHECKING:
    from lora_grpo.export.source import ExportedFormat, Source

PACKAGES = (
    "torch",
    "transformers",
    "gguf",
    "llama-cpp-python",
    "bitsandbytes",
    "llmcompressor",
    "compressed-tensors",
)
COLUMNS = ("MB", "mean KL from merged", "same greedy choice", "strict accuracy", "merged", "p")


@dataclass(frozen=True)
class ExportResult:
    """Where the exports are, what was checked, and the commands that run them."""

    folder: Path
    report: dict[str, Any]
    commands: list[str]

    @property
    def table(self) -> str:
        """Size, distance from the merged model and accuracy of each file, as a Markdown table."""
        return build_table(self.report)


class ExportProofError(FailedError):
    """An export was not what it should be and nothing was kept; the message names the failures."""


def export_model(config: ExportConfig, say: Callable[[str], None] = say) -> ExportResult:
    """Export a model in every format asked for, and prove each before any of them appears.

    Raises:
        ValueError, OSError: what was given cannot be exported so; the message says what to do.
        ExportProofError: a proof failed; `<output-dir>.failed.json` says how.
        MergeProofError: the merge failed its own.
    """
    from lora_grpo.export.formats import check_formats, write_formats
    from lora_grpo.export.source import inspect_source

    source = inspect_source(config)
    check_formats(config, source)
    check_room(config.target, 0, "--output-dir")  # the merge knows its size
    with staged_directory(config.target) as staged:
        exported = write_formats(config, source, staged, say)
        report = build_report(source, exported)
        if not report["passed"]:
            path = failure_report(config.target)
            write_json(path, report)
            failed = "; ".join(
                f"{name}: {check.name} ({check.detail})"
                for name, one in exported.items()
                for check in one.failed
            )
            raise ExportProofError(
                f"an export is not the merged model, it failed: {failed}. Nothing was kept but "
                f"{path}, which says more"
            )
        for name in exported:
            folder = config.folder(staged, name)
            own = {**report, "formats": {name: report["formats"][name]}}
            write_json(folder / EXPORT_FILE, own)
            if name != "safetensors":  # the merge wrote its own card
                write_card(folder, source, name, own)
        if len(exported) > 1:
            write_json(staged / EXPORT_FILE, report)
    commands = [
        line
        for name, one in exported.items()
        for line in one.commands_in(config.folder(config.target, name))
    ]
    return ExportResult(config.target, report, commands)


def build_report(source: "Source", exported: "dict[str, ExportedFormat]") -> dict[str, Any]:
    """Return `export_report.json`: each format's checks, figures and commands."""
    from lora_grpo.export.source import HERE
    from lora_grpo.policy.adapter import hash_weights

    return {
        "source": source.name,
        "adapter_sha256": hash_weights(source.record.folder) if source.plan else None,
        "passed": not any(one.failed for one in exported.values()),
        "formats": {
            name: {
                "checks": [asdict(check) for check in one.checks],
                "figures": one.figures,
                "commands": one.commands_in(HERE),
            }
            for name, one in exported.items()
        },
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := find_version(name))},
    }


def find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def build_table(report: dict[str, Any]) -> str:
    """Return size, distance from the merged model and accuracy of every file in Markdown, without
    the columns that no file fills."""
    rows = []
    for name, found in report["formats"].items():
        figures = found["figures"]
        files = {name: figures} if "bytes" in figures else figures
        rows += [
            (name if own is figures else f"{name} {quant}", describe_file(own))
            for quant, own in files.items()
        ]
    columns = [column for column in COLUMNS if any(column in cells for _, cells in rows)]
    lines = [f"| format | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, cells in rows:
        lines.append(f"| {' | '.join((name, *(cells.get(column, '') for column in columns)))} |")
    return "\n".join(lines)


def describe_file(figures: dict[str, Any]) -> dict[str, str]:
    """Return a file's figures as text, by the column that they stand in."""
    cells = {"MB": f"{figures['bytes'] / 1e6:.1f}"}
    if distance := figures.get("from_merged") or figures.get("llamacpp_from_merged"):
        cells["mean KL from merged"] = f"{distance['mean_kl']:.2e}"
        cells["same greedy choice"] = f"{distance['greedy_agreement']:.2%}"
    if accuracy := figures.get("accuracy"):
        cells["strict accuracy"] = f"{accuracy['export']['strict_accuracy']:.1%}"
        cells["merged"] = f"{accuracy['merged']['strict_accuracy']:.1%}"
        cells["p"] = f"{accuracy['mcnemar_p']:.2g}"
    return cells


def write_card(folder: Path, source: "Source", name: str, report: dict[str, Any]) -> None:
    """Write the README.md of one format's folder."""
    from lora_grpo.export.source import SYSTEM_PROMPT
    from lora_grpo.results.card import CardNote, escape, fence, write_model_card

    found = report["formats"][name]
    checks = [f"- {escape(check['name'])}: {escape(check['detail'])}" for check in found["checks"]]
    proof = f"Read back and compared with the merged model; `{EXPORT_FILE}` holds all of it."
    note = CardNote(
        title=f"{source.name}, {name}",
        kind="quantized",
        library_name="gguf" if name in ("gguf", "gguf-adapter", "ollama") else "transformers",
        name=source.name,
        summary=f"`{escape(source.name)}` as {name}, for which `{SYSTEM_PROMPT}` holds the "
        "system prompt that it was trained with.",
        use=fence("\n".join(found["commands"]), "bash"),
        proof="\n\n".join((proof, build_table(report), "\n".join(checks))),
    )
    write_model_card(folder, source.record.folder, note)
