"""The sitting's script, with a python and an nvidia-smi that are made up: whatever a stage does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SITTING = Path(__file__).parent / "gpu" / "sitting.sh"
STAGES = ["env", "generate", "float16", "merge", "unsloth", "memory"]
STAGES += ["sync", "vllm", "speed", "real"]
GPU = "#!/bin/sh\necho 'GPU 0: NVIDIA Made-Up (UUID: GPU-0)'\n"
# Stands for `python -m pytest FILE ...`: what happens depends on the stage's test file.
PYTHON = """#!/bin/sh
echo "$PYTHONPATH $GPU_MODELS $GPU_GSM8K $HF_HUB_OFFLINE" > "$GPU_OUT/environment"
case $3 in
    *test_unsloth.py) echo "E   RuntimeError: broken on purpose"; echo "1 failed in 0.1s"; exit 1 ;;
    *test_memory_cap.py) sleep 600 & echo $! > "$GPU_OUT/left"; sleep 600 ;;
    *test_vllm_sync.py) echo "SKIPPED [2] tests/gpu/x.py:3: vllm is not installed"
        echo "== 2 skipped in 0.1s ==" ;;
    *) echo "figure: steps = 7"; echo "=== 3 passed, 1 skipped in 0.1s ===" ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A machine with a made-up GPU, a model folder and data."""
    for name, text in {"nvidia-smi": GPU, "python": PYTHON}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name in ("models", "gsm8k", "site"):
        (tmp_path / name).mkdir()
    return tmp_path


def sit(home: Path, *arguments: object, gpu: bool = True) -> subprocess.CompletedProcess[str]:
    path = f"{home / 'bin'}:" * gpu + "/usr/bin:/bin"
    return subprocess.run(
        ["bash", SITTING, *map(str, arguments)],
        cwd=home,
        env={"PATH": path, "PYTHON": str(home / "bin" / "python"), "STAGE_SECONDS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def table(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """Return the rows of the table that comes last, by stage."""
    lines = done.stdout.rpartition("\nstage ")[2].splitlines()[1:]
    return {line.split()[0]: line.split(maxsplit=3)[1:] for line in lines}


def gone(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_failure_and_no_hang_stops_the_rest(home: Path) -> None:
    done = sit(home, "models", "gsm8k", "results")
    rows = table(done)
    assert list(rows) == STAGES, done.stdout + done.stderr
    assert done.returncode == 1
    results = {stage: row[0] for stage, row in rows.items()}
    assert results.pop("unsloth") == "failed" and results.pop("memory") == "failed"
    assert results.pop("sync") == "skipped"
    assert set(results.values()) == {"ok"}
    assert rows["unsloth"][2] == "E   RuntimeError: broken on purpose"
    assert rows["memory"][2] == "ended at its limit of 1 s"
    assert rows["sync"][2] == "vllm is not installed"
    assert rows["real"][2] == "figure: steps = 7"
    assert {path.stem for path in (home / "results").glob("*.log")} == set(STAGES)
    assert (home / "results" / "table.txt").read_text() in done.stdout


def test_nothing_of_a_stage_outlives_it(home: Path) -> None:
    sit(home, "models", "gsm8k", "results", "--", "memory")
    left = int((home / "results" / "left").read_text())
    deadline = time.monotonic() + 10
    while not gone(left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(left)


def test_chosen_stages_run_in_the_order_given(home: Path) -> None:
    done = sit(home, "models", "--", "real", "env")
    assert list(table(done)) == ["real", "env"]
    assert done.returncode == 0


def test_a_stage_sees_the_folders_and_no_network(home: Path) -> None:
    sit(home, "--site", "site", "models", "gsm8k", "results", "--", "env")
    path, models, data, offline = (home / "results" / "environment").read_text().split()
    assert path == f"{SITTING.parents[2]}:{home / 'site'}"
    assert (models, data, offline) == (str(home / "models"), str(home / "gsm8k"), "1")


def test_without_a_gpu_every_stage_is_skipped_and_the_table_still_comes(home: Path) -> None:
    done = sit(home, "models", "gsm8k", gpu=False)
    if "Made-Up" not in done.stdout and "gpu: none" not in done.stdout:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 0
    assert {stage: row[0] for stage, row in table(done).items()} == dict.fromkeys(STAGES, "skipped")
    assert done.stdout.count("no GPU: nvidia-smi lists none") == 2 * len(STAGES)


MISTAKES = {
    "unknown stage": (
        ["models", "--", "envv"],
        "no stage envv; the stages are: " + " ".join(STAGES),
    ),
    "no models": ([], "MODELS_DIR is missing"),
    "no such folder": (["nothing"], "nothing is no folder"),
    "unknown flag": (["--fast", "models"], "unknown flag --fast"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_runs(home: Path, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    done = sit(home, *arguments)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (home / "gpu-sitting").exists()


def test_it_can_be_run_as_it_is() -> None:
    assert os.access(SITTING, os.X_OK)


def test_without_a_gpu_the_gpu_tests_skip_with_their_reason_and_never_load_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import pytest; "
        f"sys.exit(pytest.main([{str(SITTING.parent)!r}, '-v', '-rs', '-p', 'no:cacheprovider']))"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GPU_TESTS_ON_CPU": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=hidden, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert " skipped in " in last and "passed" not in last
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons and all("no GPU: nvidia-smi lists none" in line for line in reasons)
