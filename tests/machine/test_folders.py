"""What a script is given: the wrong kind of folder, and folders of which files are broken."""

import json
import shutil
from pathlib import Path

import pytest
from commands import FEW, run_here

from lora_grpo.machine.folders import kind_of, run_of
from lora_grpo.policy.adapter import check_adapter
from lora_grpo.policy.base import EMBEDDED_FOLDER
from lora_grpo.policy.checkpoints import BEST, IN_A_CHECKPOINT, check_run

SMALL = (*FEW, "--run-name", "my run", "--eval-steps", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps, `adapters/my run`, and what was made from it, in name."""
    home = tmp_path_factory.mktemp("home")
    done = run_here("train_lora.py", *SMALL, home=home)
    assert done.returncode == 0, done.stderr
    merged = shutil.copytree(EMBEDDED_FOLDER, home / "merged" / "my run")
    (merged / "merge_report.json").write_text(json.dumps({"adapter": "my run", "passed": True}))
    shutil.copy(home / "adapters/my run/train_config.json", merged)
    export = home / "exports" / "my run-gguf"
    export.mkdir(parents=True)
    (export / "export_report.json").write_text(json.dumps({"source": "my run"}))
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "home")


def test_every_kind_of_folder_is_known(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    run_dir = Path("adapters/my run")
    kinds = {
        run_dir: "run",
        run_dir / "last": "last",
        run_dir / "checkpoint-2": "checkpoint",
        Path("merged/my run"): "merged",
        Path("exports/my run-gguf"): "export",
        EMBEDDED_FOLDER: "model",
        Path("merged"): "other",
    }
    assert {folder: kind_of(folder) for folder in kinds} == kinds
    of_a_run = [folder for folder, kind in kinds.items() if kind not in ("model", "other")]
    assert {run_of(folder) for folder in of_a_run} == {run_dir}


@pytest.mark.parametrize(
    ("script", "given", "typed"),
    [
        ("train_lora.py", ["--resume", "merged/my run"], "--resume 'adapters/my run'"),
        ("train_lora.py", ["--resume", "adapters/my run/last"], "--resume 'adapters/my run'"),
        ("train_lora.py", ["--resume", "adapters/my run/checkpoint-1"], "'adapters/my run'"),
        ("merge_adapter.py", ["merged/my run", "--output-dir", "x"], "--model 'merged/my run'"),
        ("evaluate.py", ["merged/my run"], "--model 'merged/my run'"),
        ("chat.py", ["exports/my run-gguf", "--ask", "x"], "chat.py 'adapters/my run'"),
        ("serve.py", ["exports/my run-gguf"], "serve.py 'adapters/my run'"),
        ("export_model.py", ["exports/my run-gguf", "--format", "gguf"], "'adapters/my run'"),
        ("push_to_hub.py", ["merged/my run", "--repo", "me/x"], "--repo you/name --merged"),
    ],
)
def test_the_wrong_folder_gets_the_right_command(
    home: Path, script: str, given: list[str], typed: str
) -> None:
    before = sorted(path.stat().st_mtime_ns for path in home.rglob("*"))
    done = run_here(script, *given, home=home)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"scripts/{script if 'model' not in typed else 'evaluate.py'}" in done.stderr
    assert done.stderr.strip().endswith(typed)
    assert sorted(path.stat().st_mtime_ns for path in home.rglob("*")) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_broken_adapter_is_named(home: Path, name: str) -> None:
    path = home / "adapters/my run" / name
    cut(path)
    with pytest.raises(ValueError, match=rf"{path} is n"):
        check_adapter(path.parent, "evaluate.py")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        check_adapter(path.parent, "evaluate.py")


def test_a_broken_checkpoint_is_named_with_the_one_before_it(home: Path) -> None:
    run_dir = home / "adapters/my run"
    for name in {*IN_A_CHECKPOINT, BEST} - {"adapter_config.json"}:
        path = run_dir / "checkpoint-2" / name
        whole = path.read_bytes()
        check_run(run_dir)
        cut(path)
        with pytest.raises(ValueError, match=rf"-2/{name}.*remove .*-2 .*checkpoint-1$"):
            check_run(run_dir)
        path.write_bytes(whole)


def test_what_is_gone_of_a_run_is_named(home: Path) -> None:
    run_dir = home / "adapters/my run"
    (run_dir / "metrics.jsonl").rename(run_dir / "metrics")
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl holds no step"):
        check_run(run_dir)
    (run_dir / "metrics").rename(run_dir / "metrics.jsonl")
    (run_dir / "checkpoint-2/optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2/optimizer.pt is missing"):
        check_run(run_dir)
    with (run_dir / "validation.jsonl").open("a") as file:
        file.write('{"step": 2, "str\n')
    with pytest.raises(ValueError, match=r"validation.jsonl, line \d+"):
        check_run(run_dir)


def test_a_run_resumes_without_the_file_of_its_best_adapter(home: Path) -> None:
    """The checkpoint holds a copy."""
    run_dir = home / "adapters/my run"
    whole = (run_dir / "adapter_model.safetensors").read_bytes()
    (run_dir / "adapter_model.safetensors").unlink()
    done = run_here("train_lora.py", "--resume", run_dir, home=home)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("broken", [True, False])
def test_evaluation_names_a_lost_or_broken_record(home: Path, broken: bool) -> None:
    path = home / "adapters/my run/eval.json"
    cut(path) if broken else path.unlink()
    done = run_here("evaluate.py", path.parent, home=home)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(path) in done.stderr


def test_no_file_holds_the_place_of_the_embedded_model(trained: Path) -> None:
    files = [path for path in (trained / "adapters").rglob("*") if path.is_file()]
    assert any(path.parent.name == "checkpoint-2" for path in files)
    place = str(EMBEDDED_FOLDER).encode()
    assert [path for path in files if place in path.read_bytes()] == []
    config = json.loads((trained / "adapters/my run/last/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
