"""An adapter becomes the formats that people run, each read back and held against the merged model.

Check, merge once, write and prove every format, and only then appear under the final name. Nothing
heavy is imported here, so that `--help` and a wrong flag answer at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.export.config import ExportConfig
from lora_grpo.machine.terminal import FailedError
from lora_grpo.merge.command import Report, free_name, say

if TYPE_CHECKING:
    from lora_grpo.export.source import Outcome

REPORT = "export_report.json"


@dataclass(frozen=True)
class ExportResult:
    """Where the exports are, what was checked, and the commands that run them."""

    folder: Path
    report: dict[str, Any]
    commands: list[str]

    @property
    def table(self) -> str:
        """Size, distance from the merged model and accuracy of each file, as a Markdown table."""
        from lora_grpo.export.report import build_table

        return build_table(self.report)


class ExportProofError(FailedError):
    """An export was not what it should be and nothing was kept; the message names the failures."""


def export_model(config: ExportConfig, report: Report = say) -> ExportResult:
    """Export a model in every format asked for, and prove each before any of them appears.

    Raises:
        ValueError, OSError: what was given cannot be exported so; the message says what to do.
        ExportProofError: a proof failed; `<output-dir>.failed.json` says how.
        MergeProofError: the merge failed its own.
    """
    from lora_grpo.export.formats import check_formats, write_formats
    from lora_grpo.export.report import build_report, list_failures
    from lora_grpo.export.source import inspect_source
    from lora_grpo.machine.files import check_room, staged_directory, write_json

    request = inspect_source(config)
    check_formats(config, request)
    check_room(config.target, 0, "--output-dir")  # the merge knows its size
    with staged_directory(config.target) as staged:
        outcomes = write_formats(config, request, staged, report)
        found = build_report(config, request, outcomes)
        failures = list_failures(outcomes)
        if failures:
            path = free_name(config.target.with_name(f"{config.target.name}.failed.json"))
            write_json(path, found)
            raise ExportProofError(
                f"an export is not the merged model, it failed: {'; '.join(failures)}. Nothing "
                f"was kept but {path}, which says more"
            )
        settle(config, request, staged, outcomes, found)
    commands = [
        line
        for name, outcome in outcomes.items()
        for line in outcome.commands_in(config.folder(config.target, name))
    ]
    return ExportResult(config.target, found, commands)


def settle(
    config: ExportConfig,
    request: Any,
    staged: Path,
    outcomes: "dict[str, Outcome]",
    found: dict[str, Any],
) -> None:
    """Add report and card to each proven format."""
    from lora_grpo.export.report import write_export_card
    from lora_grpo.machine.files import write_json

    for name, outcome in outcomes.items():
        folder = config.folder(staged, name)
        write_json(folder / REPORT, {**found, "formats": {name: found["formats"][name]}})
        if name != "safetensors":  # the merge wrote its own
            write_export_card(folder, request, name, outcome)
    if len(outcomes) > 1:
        write_json(staged / REPORT, found)
