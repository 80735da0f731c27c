"""The rooms of the package and their order: a room imports only from rooms to its left."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_grpo"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

ROOMS = [
    *("machine", "tasks", "data", "config", "rewards", "policy", "grpo", "memory", "results"),
    *("diagnosis", "report", "train", "proof", "merge", "export", "deploy", "doctor", "dev"),
]
# What answers `--help`, wrong flags and the doctor's questions, and outside checks.
WITHOUT_TORCH = [
    *("config.presets", "config.files", "data.problems", "data.prompt", "data.sources"),
    *("machine.backend", "machine.terminal", "policy.open", "policy.unsloth", "policy.vllm"),
    *("grpo.vllm_rollout", "rewards.check", "memory.command", "train.prepare"),
    *("merge.command", "export.command", "deploy.hub_files", "deploy.chat", "deploy.serve"),
    *("diagnosis.command", "report.command", "doctor.command", "cli"),
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, `from lora_grpo import x` counted as `x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "lora_grpo" if node.level else node.module
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if module == "lora_grpo" else {module}
    return found


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    return {name for name in imports_of(path) if name.startswith("lora_grpo.")}


def test_the_rooms_are_these() -> None:
    assert {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "cli.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_its_left(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "EMBEDDED_FOLDER"}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        rooms = {name.split(".")[1] for name in own_imports(path)}
        assert rooms <= allowed, f"{dotted(path)} imports from {sorted(rooms - allowed)}"


def test_no_two_modules_import_each_other() -> None:
    imports = {dotted(path): own_imports(path) for path in MODULES}
    left = dict(imports)
    while free := [name for name, needed in left.items() if not needed & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"these modules are in a circle: {sorted(left)}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_the_library_and_never_each_other(path: Path) -> None:
    names = {name.partition(".")[0] for name in imports_of(path)}
    assert "lora_grpo" in names
    assert not names & ({"scripts"} | {script.stem for script in SCRIPTS})
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If) and "__main__" in ast.dump(last.test)


def test_what_answers_at_once_needs_no_torch() -> None:
    """The light modules are imported where the heavy packages cannot be."""
    code = f"""
import importlib, sys
for heavy in ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes"):
    sys.modules[heavy] = None  # an ImportError for whoever asks
import lora_grpo
for name in {WITHOUT_TORCH}:
    importlib.import_module("lora_grpo." + name)
import lora_grpo.rewards
assert lora_grpo.rewards.score("<answer>1</answer>", "1")["correctness"] == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_no_model_s_own_code_is_ever_run() -> None:
    """transformers asks `[y/N]` on standard input where `trust_remote_code` is left out."""
    checked = 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not re.fullmatch(r"Auto(Config|Tokenizer|Model\w*)\.from_\w+", called):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"
            checked += 1
    assert checked > 10
