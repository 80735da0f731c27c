"""The commit that a record names is this code's own, or none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lora_grpo.train.provenance import git_commit

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that holds a package."""
    package = tmp_path / "lora_grpo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


@needs_git
def test_a_checkout_of_its_own_names_its_commit(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "--annotate", "v1", "--message", "a tag changes nothing")
    assert git_commit(checkout / "lora_grpo") == commit
    (checkout / "lora_grpo" / "__init__.py").write_text("changed = True\n")
    assert git_commit(checkout / "lora_grpo") == f"{commit}-dirty"


@needs_git
def test_inside_another_checkout_there_is_none(checkout: Path) -> None:
    package = checkout / ".venv/lib/python3.12/site-packages/lora_grpo"
    shutil.copytree(checkout / "lora_grpo", package)
    assert git_commit(package) is None


def test_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
