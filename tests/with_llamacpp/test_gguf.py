"""Exported GGUF files run in llama.cpp: the same ids, ends, logits and greedy answers."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_grpo.data.prompt import build_messages, render
from lora_grpo.policy.base import EMBEDDED_FOLDER

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed here; make test-llamacpp installs it",
)
ROOT = Path(__file__).parents[2]
MODELS = ("tiny", "smollm2-135m")
FEW = ("--preset", "tiny", "--max-steps", "4", "--num-eval-items", "32")
FEW += ("--num-validation-items", "8", "--max-completion-length", "64")


def run(script: str, *arguments: object, cwd: Path = ROOT) -> str:
    command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function that finds a model's folder, or skips."""
    return lambda name: EMBEDDED_FOLDER if name == "tiny" else request.getfixturevalue("smollm2")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, folder_of):
    """Return a function that exports a model's f16 and K-quant files, once."""
    made: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "gguf"
            quants = "f16,q8_0,q4_0,q4_k_m,q5_k_m,q6_k"
            arguments = ("--format", "gguf", "--quant", quants, "--output-dir", made[name])
            print(run("export_model.py", folder_of(name), *arguments))
        return made[name]

    return export


@pytest.mark.parametrize("name", MODELS)
def test_every_type_passes_its_proof_in_llamacpp(name: str, exports) -> None:
    report = json.loads((exports(name) / "export_report.json").read_text())
    checks = report["formats"]["gguf"]["checks"]
    for quant in ("f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"):
        ran = [check for check in checks if check["name"].startswith(f"{quant} llamacpp")]
        assert len(ran) == 3 and all(check["passed"] for check in ran)
        for check in ran:
            print(f"{name} {check['name']}: {check['detail']}")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_the_merged_models(name: str, exports, folder_of) -> None:
    """Not by the library's own loop: llama.cpp's chat completion against transformers' generate."""
    import llama_cpp

    folder = folder_of(name)
    # No near tie among their tokens: the two best logits are 0.005 apart or more.
    questions = ["What is 12 + 30?", "What is the capital of France?", "Name three colours."]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    path = next(exports(name).glob("*-F16.gguf"))
    llama = llama_cpp.Llama(str(path), n_ctx=512, verbose=False)
    ended = 0
    for question in questions:
        messages = build_messages(question)
        ids = tokenizer(render(tokenizer, messages), return_tensors="pt", add_special_tokens=False)
        output = model.generate(**ids, max_new_tokens=96, do_sample=False)
        expected = output[0, ids["input_ids"].shape[1] :]
        said = llama.create_chat_completion(
            messages, temperature=0.0, repeat_penalty=1.0, max_tokens=96
        )
        found = said["choices"][0]
        assert found["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
        is_ended = expected[-1].item() == tokenizer.eos_token_id
        assert found["finish_reason"] == ("stop" if is_ended else "length")
        ended += is_ended
    assert ended, "no answer ended, so stopping at the end of a turn was not seen"


def test_the_adapter_runs_on_the_base(tmp_path: Path) -> None:
    """A trained run: `gguf-adapter` is run on the base's file, `ollama` by a K-quant."""
    run("train_lora.py", *FEW, "--run-name", "run", "--adapters-dir", tmp_path)
    arguments = ("--format", "gguf-adapter", "ollama", "--quant", "q4_k_m", "--num-items", "32")
    print(run("export_model.py", tmp_path / "run", *arguments, "--output-dir", tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    adapter = report["formats"]["gguf-adapter"]
    assert {check["name"] for check in adapter["checks"]} == {
        "deltas",
        "llamacpp_tokens",
        "llamacpp_end",
        "llamacpp_logits",
    }
    assert all(check["passed"] for check in adapter["checks"])
    accuracy = report["formats"]["ollama"]["figures"]["q4_k_m"]["accuracy"]
    assert accuracy["num_items"] == 32
