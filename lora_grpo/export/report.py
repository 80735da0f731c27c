"""What an export leaves to read: `export_report.json`, a table for the terminal, and the card."""

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.export.source import HERE
from lora_grpo.machine.files import write_json
from lora_grpo.machine.folders import EXPORT_FILE
from lora_grpo.policy.adapter import hash_weights

if TYPE_CHECKING:
    from lora_grpo.export.config import ExportConfig
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
SYSTEM_PROMPT = "system_prompt.txt"
COLUMNS = ("MB", "mean KL from merged", "same greedy choice", "strict accuracy", "merged", "p")
LIBRARIES = {"gguf": "gguf", "gguf-adapter": "gguf", "ollama": "gguf"}


def build_report(
    config: "ExportConfig", source: "Source", exported: "dict[str, ExportedFormat]"
) -> dict[str, Any]:
    """Return `export_report.json`: each format's checks, figures and commands."""
    return {
        "source": config.name,
        "adapter_sha256": hash_weights(source.plan.record.folder) if source.plan else None,
        "passed": not list_failures(exported),
        "formats": {
            name: {
                "checks": [asdict(check) for check in one.checks],
                "figures": one.figures,
                "commands": one.commands_in(HERE),
            }
            for name, one in exported.items()
        },
        "python": platform.python_version(),
        "versions": find_versions(),
    }


def find_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def list_failures(exported: "dict[str, ExportedFormat]") -> list[str]:
    """Return each failed check with its format and what it found."""
    return [
        f"{name}: {check.name} ({check.detail})"
        for name, one in exported.items()
        for check in one.checks
        if not check.passed
    ]


def list_files(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the figures of every file, by its format and type."""
    rows = []
    for name, found in report["formats"].items():
        figures = found["figures"]
        if "bytes" in figures:
            rows.append((name, figures))
        else:
            rows += [(f"{name} {quant}", row) for quant, row in figures.items()]
    return rows


def build_table(report: dict[str, Any]) -> str:
    """Return size, distance from the merged model and accuracy of every file in Markdown, without
    the columns that no file fills."""
    rows = [(name, describe_file(figures)) for name, figures in list_files(report)]
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


def write_reports(
    config: "ExportConfig",
    source: "Source",
    staged: Path,
    exported: "dict[str, ExportedFormat]",
    report: dict[str, Any],
) -> None:
    """Add report and model card to each format's folder."""
    for name, one in exported.items():
        folder = config.folder(staged, name)
        write_json(folder / EXPORT_FILE, {**report, "formats": {name: report["formats"][name]}})
        if name != "safetensors":  # the merge wrote its own card
            write_export_card(folder, source, name, one)
    if len(exported) > 1:
        write_json(staged / EXPORT_FILE, report)


def write_export_card(folder: Path, source: "Source", name: str, one: "ExportedFormat") -> None:
    """Write the README.md of one format's folder."""
    from lora_grpo.results.card import CardNote, escape, fence, write_model_card

    report = {"formats": {name: {"figures": one.figures}}}
    checks = [f"- {escape(check.name)}: {escape(check.detail)}" for check in one.checks]
    commands = "\n".join(one.commands_in(HERE))
    note = CardNote(
        title=f"{source.name}, {name}",
        kind="quantized",
        library_name=LIBRARIES.get(name, "transformers"),
        name=source.name,
        summary=f"`{escape(source.name)}` as {name}, for which `{SYSTEM_PROMPT}` holds the "
        "system prompt that it was trained with.",
        use=fence(commands, "bash"),
        proof="\n\n".join(
            (
                "Read back and compared with the merged model; `export_report.json` holds all "
                "of it.",
                build_table(report),
                "\n".join(checks),
            )
        ),
    )
    write_model_card(folder, source.records, note)
