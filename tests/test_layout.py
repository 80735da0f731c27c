"""DESIGN.md, sections 2 and 3: a module imports only from modules to its left in one line."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_grpo"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

ORDER = [
    # knobs, and files that appear whole
    *("terminal", "folders", "own_process"),
    *("atomic", "config", "config_file", "hardware", "backend", "presets"),
    *("doctor_machine", "doctor_probes", "doctor_packages", "doctor_gpu", "doctor"),
    # dataset -> prompt
    *(
        "arithmetic",
        "table",
        "splits",
        "columns",
        "quantity",
        "answers",
        "gold",
        "dataset",
        "prompt",
    ),
    # -> rollout
    *("memory_error", "model", "lora_layers", "rollout", "unsloth_model", "unsloth_policy"),
    # -> reward
    *("custom_rewards", "rewards", "scoring", "reward_corpus", "reward_check"),
    *("pretrain", "tiny_card"),
    "prepare",
    # -> what a run holds in memory
    *(
        "allocator",
        "model_shape",
        "memory",
        "memory_update",
        "memory_packed",
        "memory_rollout",
        "memory_plan",
    ),
    *("memory_report", "memory_prompts", "memory_measure", "memory_command"),
    # -> GRPO update -> adapter -> evaluate
    *("adapter", "grpo", "batch", "engine_settings", "vllm_engine"),
    *("seams", "tiled_logprobs", "shared_prefix", "live_rows", "dynamic_sampling"),
    *("shared_sampling", "packed_trainer", "trainer"),
    *(
        "vllm_rollout",
        "policy",
        "peak_memory",
        "record",
        "console",
        "evaluate",
        "idle_knobs",
        "plan",
        "provenance",
    ),
    # the model card
    *("card_markdown", "card_base", "card_records", "card_metadata", "card_evaluation"),
    *("card_training", "card_use", "card_curves", "card"),
    *(
        "train",
        "job",
    ),
    # -> merge
    *("safetensors_stream", "lora_delta", "logit_distance"),
    *("merge_inputs", "merge_folder", "merge_weights", "merge_reference", "merge_checks"),
    *("merge_proof", "merge_report", "merge"),
    # how fast update and merge are
    *("benchmark_cases", "benchmark_worker", "benchmark_report", "benchmark"),
    # -> export
    *("export_config", "export_source", "export_reference", "export_report"),
    *("gguf_tokenizer", "gguf_quants", "gguf_model", "gguf_write", "llamacpp", "llamacpp_proof"),
    *("gguf_proof", "export_gguf", "export_gguf_adapter"),
    *("ollama_gotemplate", "ollama_template", "ollama_modelfile", "ollama_proof", "export_ollama"),
    *("export_checks", "export_bnb"),
    *("export_schemes", "export_packed", "export_calibration", "export_compressed"),
    *("export_accuracy", "export_formats", "export"),
    # -> push
    *("push_end", "push_files", "push_patience", "push_remote", "push_errors", "push"),
    # -> chat and serve
    *("chat_tags", "chat_source", "chat_model", "chat_screen", "chat"),
    *("serve_transformers", "serve_command", "serve"),
]
WITHOUT_TORCH = [
    *("terminal", "folders", "own_process"),
    *("atomic", "config", "config_file", "hardware", "backend", "presets", "arithmetic", "table"),
    *("doctor_machine", "doctor_probes", "doctor_packages", "doctor_gpu", "doctor"),
    *(
        "splits",
        "columns",
        "quantity",
        "answers",
        "gold",
        "dataset",
        "prompt",
        "engine_settings",
        "vllm_engine",
        "vllm_rollout",
        "policy",
    ),
    *("model", "rollout", "unsloth_model", "unsloth_policy"),
    *("custom_rewards", "rewards", "scoring", "reward_corpus", "reward_check"),
    "prepare",
    *(
        "allocator",
        "model_shape",
        "memory",
        "memory_update",
        "memory_packed",
        "memory_rollout",
        "memory_plan",
    ),
    *("memory_report", "memory_prompts", "memory_measure", "memory_command"),
]


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


def test_every_module_has_its_place() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == there, "give each module its place in ORDER"
    assert not {"utils", "common", "types", "helpers", "misc"} & there
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]


@pytest.mark.parametrize("module", ["__init__", *ORDER])
def test_a_module_imports_only_from_its_left(module: str) -> None:
    own = {
        name.partition(".")[2]
        for name in imports_of(PACKAGE / f"{module}.py")
        if name.partition(".")[0] == "lora_grpo"
    }
    left = ORDER[: ORDER.index(module)] if module in ORDER else []
    assert own <= set(left), f"{module} imports {sorted(own - set(left))} from its right"


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
assert lora_grpo.rewards.score("<answer>1</answer>", "1")["correctness"] == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_no_model_s_own_code_is_ever_run() -> None:
    """transformers asks `[y/N]` on standard input where `trust_remote_code` is left out."""
    checked = 0
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not re.fullmatch(r"Auto(Config|Tokenizer|Model\w*)\.from_\w+", called):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"
            checked += 1
    assert checked > 10
