"""The command that writes the page of one run, or of several side by side."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_grpo.diagnosis.history import read_history
from lora_grpo.diagnosis.rules import diagnose
from lora_grpo.machine.folders import check_kind
from lora_grpo.report.page import REPORT, write_report

MARK = '<meta name="generator" content="lora-grpo report">'


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html of one run, or of several side by side."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Adapter directories, such as adapters/tiny."""
    output: Path | None = None
    """The file to write; by default report.html in the run's directory, or here for several. Only
    an earlier report is overwritten."""

    def __post_init__(self) -> None:
        if not self.run_dirs:
            raise ValueError("give one or more adapter directories, such as adapters/tiny")

    @property
    def target(self) -> Path:
        """The file that is written."""
        return self.output or (
            self.run_dirs[0] / REPORT if len(self.run_dirs) == 1 else Path(REPORT)
        )


def write(config: ReportConfig) -> Path:
    """Write the page and return where it is.

    Raises:
        FileNotFoundError, ValueError: a folder is no run's, or the file is not an earlier report.
    """
    for run_dir in config.run_dirs:
        if not run_dir.is_dir():
            raise FileNotFoundError(
                f"adapter directory {run_dir} does not exist: give one that train_lora.py wrote"
            )
        check_kind(run_dir, "report.py", "adapter directories of runs", ("run",))
    target = config.target
    if target.exists() and not (target.is_file() and is_report(target)):
        raise ValueError(f"--output {target} exists and is no report: choose another name")
    findings = diagnose(read_history(config.run_dirs[0])) if len(config.run_dirs) == 1 else []
    write_report(config.run_dirs, target, [*map(str, findings)])
    return target


def is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)
