"""The merge as a user types it, and the memory that it takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run_here
from merge_models import ENVIRONMENT, change_json, make_adapter, make_tokenizer
from safetensors.torch import save_file

MEGABYTE = 1 << 20
# Not getrusage: what it gives counts the parent's memory at the fork too.
MERGE_PHASE = r"""
import re, sys
from pathlib import Path
from lora_grpo.merge.inputs import plan_merge
from lora_grpo.merge.write import write_weights
for folder in map(Path, sys.argv[1:]):
    plan = plan_merge(folder / "adapter")
    (folder / "out").mkdir()
    write_weights(plan, folder / "out")
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(len(plan.deltas), int(peak[1]) // 1024)
"""
# Freed blocks go back at once; else the C library keeps about 40 MB of them, whatever the model.
ENVIRONMENT = {**ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": str(MEGABYTE)}


def test_the_script_merges_and_says_what_next(tmp_path):
    adapter = make_adapter()
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    change_json(adapter / "adapter_config.json", base_model_name_or_path=f"{base}/.")
    done = run_here("merge_adapter.py", adapter, "--num-prompts", "1", home=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2] == "merged model: merged/run"
    assert lines[-1].startswith("next: ")
    assert lines[-1].endswith("scripts/evaluate.py --model merged/run")
    assert any(line.startswith("| merged model from base + adapter |") for line in lines)
    assert done.stderr == ""
    assert json.loads((tmp_path / "merged/run/merge_report.json").read_text())["passed"]

    again = run_here("merge_adapter.py", adapter, home=tmp_path)
    assert again.returncode == 2
    assert "exists already and is never overwritten" in re.sub(r"[│\s]+", " ", again.stderr)


def test_the_script_refuses_in_one_line(tmp_path):
    adapter = make_adapter(base_sha256="0" * 64)
    done = run_here("merge_adapter.py", adapter, "--output-dir", "out", home=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the base ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_grpo.merge.prove.prove_merge", interrupt)
    done = run_here("merge_adapter.py", make_adapter(), "--output-dir", "out", home=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def write_large(folder: Path, count: int, size: int) -> None:
    """Write a base of so many square matrices, all adapted, and as much again that is not."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    names = [f"layers.{index}.proj" for index in range(count)]
    weights = {f"{name}.weight": torch.ones(size, size).bfloat16() for name in names}
    rest = {f"{name}.other": torch.ones(size, size).bfloat16() for name in names}
    save_file({**weights, **rest}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "qwen2"}')
    make_tokenizer().save_pretrained(base)
    a = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, size) for name in names}
    b = {f"base_model.model.{name}.lora_B.weight": torch.ones(size, 4) for name in names}
    save_file({**a, **b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    size = 2048
    matrix = size * size * 2 // MEGABYTE
    for count in (2, 6):
        write_large(tmp_path / str(count), count, size)
    command = [sys.executable, "-c", MERGE_PHASE, tmp_path / "2", tmp_path / "6"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged, peaks = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert merged == (2, 6)
    assert (tmp_path / "6" / "out" / "model.safetensors").stat().st_size > 12 * matrix * MEGABYTE
    assert peaks[1] - peaks[0] < matrix, f"{peaks} MB: 8 more matrices of {matrix} MB each"
