"""What Unsloth is asked for, and that nothing which it changes passes in silence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unsloth_stand_in import CONFIG, FastLanguageModel, folder_with_ends, stand_in

from lora_grpo.policy.adapter import save_adapter
from lora_grpo.policy.base import load_tokenizer
from lora_grpo.policy.unsloth import engine_arguments, load_unsloth, refuse_what_unsloth_changes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    monkeypatch.delenv("UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * 2**30, 8 * 2**30))


def load(folder: Path, **changes):
    return load_unsloth(
        replace(CONFIG, **changes), folder, tokenizer := load_tokenizer(folder)
    ), tokenizer


def test_the_loader_gets_the_users_own_folder_and_the_runs_sizes(tiny_model_folder: Path) -> None:
    load(tiny_model_folder)
    given = FastLanguageModel.given
    assert given["model_name"] == str(tiny_model_folder)
    assert given["use_exact_model_name"] and given["local_files_only"]
    assert given["revision"] is None and given["token"] is None
    assert (given["max_seq_length"], given["max_lora_rank"], given["max_num_seqs"]) == (128, 6, 32)
    assert given["load_in_4bit"] and given["fast_inference"] and given["dtype"] == "bfloat16"
    assert given["use_gradient_checkpointing"] == "unsloth"


def test_the_adapter_gets_every_knob(tiny_model_folder: Path) -> None:
    model, _ = load(tiny_model_folder)
    lora = FastLanguageModel.lora
    assert lora == {
        "r": 6,
        "lora_alpha": 12,
        "lora_dropout": 0.25,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "use_gradient_checkpointing": "unsloth",
        "random_state": 11,
    }
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_without_vllm_and_checkpointing_neither_is_asked_for(tiny_model_folder: Path) -> None:
    load(tiny_model_folder, rollout="generate", gradient_checkpointing=False, load_in_4bit=False)
    given = FastLanguageModel.given
    assert not given["fast_inference"] and not given["load_in_4bit"]
    assert "max_num_seqs" not in given
    assert given["use_gradient_checkpointing"] is False
    assert FastLanguageModel.lora["use_gradient_checkpointing"] is False


def test_the_share_is_of_the_whole_card_in_standby_too() -> None:
    given = engine_arguments(replace(CONFIG, vllm_gpu_memory_utilization=0.6))
    assert given["gpu_memory_utilization"] == pytest.approx(0.8)
    assert os.environ.pop("UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE") == "1"
    assert engine_arguments(CONFIG)["gpu_memory_utilization"] == 0.5
    assert "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE" not in os.environ


def test_256_sequences_are_not_taken_for_no_number() -> None:
    assert engine_arguments(replace(CONFIG, vllm_max_num_seqs=256))["max_num_seqs"] == 257


def test_the_adapter_names_the_base_as_the_user_knows_it(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    model, _ = load(folder_with_ends(tiny_model_folder, snapshot, [2]), rollout="generate")
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == "owner/name"


def test_turns_end_with_every_token_that_the_folder_declares(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = folder_with_ends(tiny_model_folder, tmp_path / "model", [5, 2])
    model, tokenizer = load(folder)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 5] == [2, 5]


def test_padding_never_ends_a_turn(tiny_model_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    load_unsloth(CONFIG, tiny_model_folder, tokenizer)
    assert tokenizer.pad_token == FastLanguageModel.pad_token
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(load_tokenizer(tiny_model_folder))


def test_requests_leave_nothing_where_the_run_stands(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = load(tiny_model_folder)
    written = Path(model.load_lora("vllm_gen_lora", load_tensors=True).name)
    assert (written / "adapter_config.json").is_file()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"dtype": "float32"}, "--dtype"),
        ({"bnb_4bit_use_double_quant": False}, "--no-bnb-4bit-use-double-quant"),
        ({"init_lora_weights": "orthogonal", "load_in_4bit": False}, "--init-lora-weights"),
        ({"dynamic_sampling": True}, "--dynamic-sampling"),
        ({"max_completion_length": 5000}, "knows 1024 positions"),
    ],
)
def test_what_unsloth_would_change_is_refused(
    tiny_model_folder: Path, changes: dict, flag: str
) -> None:
    with pytest.raises(ValueError, match=flag):
        refuse_what_unsloth_changes(replace(CONFIG, **changes), tiny_model_folder)


def test_sequences_that_were_shortened_are_refused(tiny_model_folder: Path) -> None:
    FastLanguageModel.room = 127
    with pytest.raises(ValueError, match=r"sequences of 127 tokens.* come to 128"):
        load(tiny_model_folder)


def claim_in_a_new_process(tmp_path: Path, first: str) -> subprocess.CompletedProcess[str]:
    """Claim Unsloth where `unsloth` and `trl` are modules that say when they are imported."""
    for name in ("trl", "unsloth"):
        (tmp_path / f"{name}.py").write_text(f"print('imported {name}')", encoding="utf-8")
    code = f"""
import os, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
{first}
from lora_grpo.machine.backend import Choice, claim
claim(Choice("unsloth", "vllm", "", ""))
import trl
print(os.environ["UNSLOTH_VLLM_STANDBY"], os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"])
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_unsloth_is_imported_before_trl(tmp_path: Path) -> None:
    done = claim_in_a_new_process(tmp_path, "")
    assert done.stdout.split("\n")[:3] == ["imported unsloth", "imported trl", "1 0"], done.stderr


def test_a_trl_that_is_there_already_is_refused(tmp_path: Path) -> None:
    done = claim_in_a_new_process(tmp_path, "import trl")
    assert done.returncode == 1 and done.stdout == "imported trl\n"
    assert "unsloth must be imported before trl" in done.stderr
