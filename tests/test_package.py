"""The package as it is installed: its wheel works alone, outside a checkout, by `lora-grpo`."""

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lora_grpo.cli import FUNCTIONS
from lora_grpo.machine.terminal import SCRIPTS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FEW = ("--preset", "tiny", "--max-steps", 2, "--num-generations", 4)
FEW += ("--per-device-train-batch-size", 8, "--num-eval-items", 4)
FEW += ("--num-validation-items", 4, "--max-completion-length", 48)
FEW += ("--gradient-accumulation-steps", 2)


def run(command: list[object], home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        cwd=home,
        env={**clean, "COLUMNS": "100", **more},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but the wheel, which then sees this one's packages; its bin/."""
    pytest.importorskip("setuptools", reason="the wheel is built without network")
    home = tmp_path_factory.mktemp("package")
    source, wheels = home / "source", home / "wheels"
    shutil.copytree(
        ROOT / "lora_grpo", source / "lora_grpo", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    built = run([*pip, "wheel", *offline, "--no-build-isolation", "-w", wheels, source], home)
    assert built.returncode == 0, built.stderr
    made = run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], home)
    assert made.returncode == 0, made.stderr
    python = home / "venv/bin/python"
    done = run([*pip, "--python", python, "install", *offline, *wheels.glob("*.whl")], home)
    assert done.returncode == 0, done.stderr
    packages = next((home / "venv/lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return home / "venv/bin"


def test_the_wheel_trains_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    """What it prints to do next is a command that this shell has."""
    on_path = f"{installed}:/usr/bin:/bin"
    done = run([installed / "lora-grpo", "train", *FEW], tmp_path, PATH=on_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "adapters/tiny/train_config.json").read_text())
    assert record["git_commit"] is None
    assert (tmp_path / "adapters/tiny/README.md").is_file()
    following = done.stdout.strip().rpartition("next: ")[2]
    assert following == "lora-grpo merge adapters/tiny"
    assert "site-packages" not in done.stdout + done.stderr
    helped = run(["sh", "-c", f"{following} --help"], tmp_path, PATH=on_path)
    assert helped.returncode == 0 and "--output-dir" in helped.stdout, helped.stderr


def test_a_lack_of_packages_is_one_line_without_a_path_of_the_package(
    installed: Path, tmp_path: Path
) -> None:
    alone = ["-I", "-S", "-c"]
    code = (
        f"import sys; sys.path.append({str(next(installed.parent.glob('lib/*/site-packages')))!r})"
        "; sys.argv = ['lora-grpo', 'chat', 'x']; from lora_grpo.cli import main; sys.exit(main())"
    )
    done = run([installed / "python", *alone, code], tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "-m pip check" in done.stderr and "tyro" in done.stderr
    assert "requirements" not in done.stderr


def test_every_command_has_a_script_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    assert list(FUNCTIONS) == list(SCRIPTS)
    for command, script in SCRIPTS.items():
        assert f'run("{command}")' in (ROOT / "scripts" / script).read_text()
    code = "import sys; from lora_grpo.cli import main; sys.exit(main())"
    ends = {
        words: run([sys.executable, "-c", code, *words], tmp_path, PYTHONPATH=str(ROOT))
        for words in ((), ("--version",), ("trian",))
    }
    assert [done.returncode for done in ends.values()] == [0, 0, 2]
    assert all(f"  {name} " in ends[()].stdout for name in FUNCTIONS)
    assert ends["--version",].stdout == PROJECT["version"] + "\n"
    assert "trian" in ends["trian",].stderr


def pins() -> dict[str, str]:
    """Return every version that constraints.txt and the requirement files pin, by package."""
    found = {}
    for path in (*ROOT.glob("requirements*.txt"), ROOT / "constraints.txt"):
        for line in path.read_text().splitlines():
            if pin := re.match(r"([\w.-]+)==([^\s#]+)", line):
                found.setdefault(canonicalize_name(pin[1]), pin[2])
    return found


def test_what_is_pinned_satisfies_every_range() -> None:
    tested, extras = pins(), PROJECT["optional-dependencies"].values()
    for text in (*PROJECT["dependencies"], *(line for extra in extras for line in extra)):
        needed = Requirement(text)
        version = tested[canonicalize_name(needed.name)]
        assert needed.specifier.contains(version), f"{text}, but {version} is pinned"


def test_every_package_that_is_imported_is_declared() -> None:
    imported = set()
    for path in (ROOT / "lora_grpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    # These come with unsloth, vllm and llmcompressor.
    imported -= {"lora_grpo", "unsloth_zoo", "loguru", "compressed_tensors"}
    distributions = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python", "mlflow": "mlflow-skinny"}
    declared = {
        canonicalize_name(Requirement(text).name)
        for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for text in lines
    }
    for name in imported - sys.stdlib_module_names:
        assert canonicalize_name(distributions.get(name, name)) in declared, name


def test_the_dockerfile_copies_what_is_there_and_runs_commands_that_exist() -> None:
    """Without Docker: what it would be sent, copy and start is read from the files."""
    docker = (ROOT / "Dockerfile").read_text()
    sources = [
        source for line in re.findall(r"^COPY (.*)$", docker, re.M) for source in line.split()[:-1]
    ]
    assert {*sources} >= {
        "requirements.txt",
        "requirements-cpu.txt",
        "constraints.txt",
        "lora_grpo",
    }
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert sent == {*sources} and all((ROOT / source).exists() for source in sources)
    named = {Path(name).parts[0] for name in (PROJECT["readme"], *PROJECT["license-files"])}
    assert named <= {*sources}, "the wheel could not be built"
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", docker, re.M)[1]) == [*PROJECT["scripts"]]
    started = json.loads(re.search(r"^CMD (.*)$", docker, re.M)[1])
    assert {*started, *re.findall(r" lora-grpo (\w+) --preset", docker)} <= FUNCTIONS.keys()
    python = re.search(r"^FROM python:([\d.]+)-", docker, re.M)[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
