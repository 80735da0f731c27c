"""The notebooks: one runs here, the other's commands parse, and neither holds outputs."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from commands import ROOT, run_here

from lora_grpo.config.presets import parse_train_config

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id


def test_the_notebook_without_a_gpu_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name, value in {
        "NOTEBOOK_STEPS": "6",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "notebooks/without_gpu.ipynb", as_version=4)
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "\n".join(output.get("text", "") for output in outputs)
    assert "6/6" in shown and "problems were gained" in shown and "merged/tiny" in shown
    assert any("image/png" in output.get("data", {}) for output in outputs)
    (accuracy,) = [
        output["data"]["text/plain"]
        for output in outputs
        if "mcnemar_p" in output.get("data", {}).get("text/plain", "")
    ]
    base, adapter = re.findall(r"'(?:base|adapter)': ([\d.]+)", accuracy)
    assert float(adapter) > float(base)


def script_commands() -> list[tuple[str, list[str]]]:
    """Every script that the quickstart calls, with its arguments."""
    found = []
    for cell in code(ROOT / "notebooks/quickstart.ipynb"):
        for line in re.findall(r"^\s*!\{PYTHON\} scripts/(.*)$", cell, re.M):
            script, *arguments = shlex.split(re.sub(r"\{(\w+)\}", r"/nowhere/\1", line))
            found.append((script, arguments))
    return found


def test_the_quickstart_s_commands_parse(tmp_path: Path) -> None:
    commands = [(script, arguments) for script, arguments in script_commands() if arguments]
    assert {script for script, _ in commands} >= {"train_lora.py", "merge_adapter.py"}
    for script, arguments in commands:
        if script == "train_lora.py" and "--resume" not in arguments:
            config, _ = parse_train_config(arguments)
            assert config.dtype == "float16" and config.save_steps == 10
            continue
        done = run_here(script, *arguments, home=tmp_path)
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 2 and "/nowhere/RUN" in said, f"{script}: {said}"
        assert not re.search("Unrecognized|Parsing error|Perhaps you meant", said), said


def test_the_quickstart_s_cells_are_python() -> None:
    from IPython.core.inputtransformer2 import TransformerManager

    for cell in code(ROOT / "notebooks/quickstart.ipynb"):
        compile(TransformerManager().transform_cell(cell), "cell", "exec")
