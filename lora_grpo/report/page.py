"""report.html: one file that needs no network, with the data of one or several runs in it.

The page runs its own two scripts and nothing else: a Content-Security-Policy names their hashes,
and texts of a run are JSON in an inert element, which the page shows as text.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from lora_grpo.machine.files import write_text
from lora_grpo.report.gather import encode, gather_run
from lora_grpo.report.verdict import judge_run

REPORT = "report.html"
HERE = Path(__file__).parent
MOST_BYTES = 4_700_000  # for the runs; with the page's own code a file stays under 5 MB


def write_report(run_dirs: Sequence[Path], output: Path, findings: Sequence[str] = ()) -> None:
    """Write the page of one run, or of several side by side, so that a reader finds the old page
    or the new one.

    `findings` are sentences on what is wrong, the most important one first. No weights are loaded:
    a run can call this while it trains.
    """
    runs = [gather_run(run_dir, MOST_BYTES // len(run_dirs), len(run_dirs)) for run_dir in run_dirs]
    for run in runs:
        run["verdict"] = judge_run(run, list(findings) if len(runs) == 1 else [])
    write_text(output, build_page(encode({"runs": runs, "findings": list(findings)})))


def build_page(data: str) -> str:
    """Return the page around its data."""
    licence = f"/* uPlot:\n{read('uplot/LICENSE')}*/\n"
    style = read("uplot/uPlot.min.css") + read("page.css")
    library, script = licence + read("uplot/uPlot.iife.min.js"), read("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; "
        f"script-src {digest(library)} {digest(script)}; base-uri 'none'; form-action 'none'"
    )
    return Template(read("page.html")).substitute(
        policy=policy, style=style, library=library, script=script, data=data
    )


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """Return what a Content-Security-Policy calls an inline script or style."""
    found = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(found).decode()}'"
