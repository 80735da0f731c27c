"""The sitting with a made-up python and nvidia-smi: whatever a stage does, the rest runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SITTING = Path(__file__).parent / "gpu" / "sitting.sh"
STAGES = ["env", "generate", "float16", "unsloth", "memory", "sync", "vllm", "speed", "real"]
GPU = "#!/bin/sh\necho 'GPU 0: NVIDIA Made-Up (UUID: GPU-0)'\n"
# Stands for `python -m pytest FILE ...`: what happens depends on the stage's tests.
PYTHON = """#!/bin/sh
echo "$PYTHONPATH $GPU_MODELS $GPU_GSM8K $HF_HUB_OFFLINE" > "$GPU_OUT/environment"
case "$*" in
    *"[unsloth"*) echo "E   RuntimeError: broken on purpose"; echo "1 failed in 0.1s"; exit 1 ;;
    *test_memory_cap.py*) sleep 600 & echo $! > "$GPU_OUT/left"; sleep 600 ;;
    *test_vllm_sync.py*) echo "SKIPPED [2] tests/gpu/x.py:3: vllm is not installed"
        echo "== 2 skipped in 0.1s ==" ;;
    *) echo "figure: steps = 7"; echo "=== 3 passed, 1 skipped in 0.1s ===" ;;
esac
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine with a made-up GPU, a model folder and data."""
    home = tmp_path_factory.mktemp("home")
    for name in ("bin", "models", "gsm8k", "site"):
        (home / name).mkdir()
    for name, text in {"nvidia-smi": GPU, "python": PYTHON}.items():
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)
    return home


def sit(home: Path, *arguments: object, gpu: bool = True) -> subprocess.CompletedProcess[str]:
    path = f"{home / 'bin'}:" * gpu + "/usr/bin:/bin"
    return subprocess.run(
        [SITTING, *map(str, arguments)],
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


def test_no_failure_and_no_hang_stops_the_rest_and_nothing_outlives_its_stage(home: Path) -> None:
    done = sit(home, "--site", "site", "models", "gsm8k", "results")
    rows = table(done)
    assert list(rows) == STAGES, done.stdout + done.stderr
    assert done.returncode == 1
    results = {stage: row[0] for stage, row in rows.items()}
    expected = dict.fromkeys(STAGES, "ok") | {"unsloth": "failed", "memory": "failed"}
    assert results == expected | {"sync": "skipped"}
    assert rows["unsloth"][2] == "E   RuntimeError: broken on purpose"
    assert rows["memory"][2] == "ended at its limit of 1 s"
    assert rows["sync"][2] == "vllm is not installed"
    assert rows["real"][2] == "figure: steps = 7"
    assert {path.stem for path in (home / "results").glob("*.log")} == set(STAGES)
    assert (home / "results" / "table.txt").read_text() in done.stdout
    path, models, data, offline = (home / "results" / "environment").read_text().split()
    assert path == f"{SITTING.parents[2]}:{home / 'site'}"
    assert (models, data, offline) == (str(home / "models"), str(home / "gsm8k"), "1")
    left = int((home / "results" / "left").read_text())
    deadline = time.monotonic() + 10
    while not gone(left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(left)


def test_chosen_stages_run_in_the_order_given(home: Path) -> None:
    done = sit(home, "models", "--", "real", "env")
    assert list(table(done)) == ["real", "env"]
    assert done.returncode == 0


def test_without_a_gpu_every_stage_is_skipped_and_the_table_still_comes(home: Path) -> None:
    done = sit(home, "models", "gsm8k", gpu=False)
    if "gpu: none" not in done.stdout:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 0
    assert {stage: row[0] for stage, row in table(done).items()} == dict.fromkeys(STAGES, "skipped")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models", "--", "envv"], "no stage envv; the stages are: " + " ".join(STAGES)),
        ([], "MODELS_DIR is missing"),
        (["nothing"], "nothing is no folder"),
        (["--fast", "models"], "unknown flag --fast"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(
    home: Path, arguments: list[str], said: str
) -> None:
    done = sit(home, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert "stage" not in done.stdout


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
