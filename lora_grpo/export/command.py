"""An adapter becomes the formats that people run, each loaded again and compared with the merged
model.

Check, merge once, write and prove every format, and only then appear under the final name. Nothing
heavy is imported here, so that `--help` and a wrong flag answer at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.export.config import ExportConfig
from lora_grpo.machine.terminal import FailedError
from lora_grpo.merge.command import failure_report, say


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


def export_model(config: ExportConfig, say: Callable[[str], None] = say) -> ExportResult:
    """Export a model in every format asked for, and prove each before any of them appears.

    Raises:
        ValueError, OSError: what was given cannot be exported so; the message says what to do.
        ExportProofError: a proof failed; `<output-dir>.failed.json` says how.
        MergeProofError: the merge failed its own.
    """
    from lora_grpo.export.formats import check_formats, write_formats
    from lora_grpo.export.report import build_report, list_failures, write_reports
    from lora_grpo.export.source import inspect_source
    from lora_grpo.machine.files import check_room, staged_directory, write_json

    source = inspect_source(config)
    check_formats(config, source)
    check_room(config.target, 0, "--output-dir")  # the merge knows its size
    with staged_directory(config.target) as staged:
        exported = write_formats(config, source, staged, say)
        report = build_report(config, source, exported)
        if failures := list_failures(exported):
            path = failure_report(config.target)
            write_json(path, report)
            raise ExportProofError(
                f"an export is not the merged model, it failed: {'; '.join(failures)}. Nothing "
                f"was kept but {path}, which says more"
            )
        write_reports(config, source, staged, exported, report)
    commands = [
        line
        for name, one in exported.items()
        for line in one.commands_in(config.folder(config.target, name))
    ]
    return ExportResult(config.target, report, commands)
