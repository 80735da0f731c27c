"""The plan: what cannot work is refused before weights load, what is not read is said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.machine.backend import Choice
from lora_grpo.machine.hardware import GPU
from lora_grpo.memory.fit import settle_unplanned
from lora_grpo.memory.terms import GIB
from lora_grpo.policy.base import EMBEDDED_FOLDER, Placement
from lora_grpo.rewards.calls import RewardError
from lora_grpo.train.console import Display
from lora_grpo.train.plan import check_engine, describe_plan, make_plan
from lora_grpo.train.provenance import provenance
from lora_grpo.train.run import (
    base_items,
    build_trainer,
    evaluate_problems,
    open_run,
    open_training_policy,
    train,
)
from lora_grpo.train.unused_settings import describe_unused, find_unused

CPU = Placement("cpu", "float32")
GENERATE = Choice("transformers", "generate", "", "")
VLLM = Choice("transformers", "vllm", "", "")
UNSLOTH = Choice("unsloth", "vllm", "", "")
SMALL = {
    **PRESETS["tiny"],
    "preset": "tiny",
    "max_steps": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "num_eval_items": 16,
    "num_validation_items": 8,
}


def small(tmp_path: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, "adapters_dir": tmp_path, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw_typo"}, "--optim adamw_typo .* perhaps you meant adamw_torch"),
        ({"optim": "lomo"}, "--optim lomo .* install `lomo_optim`"),
        ({"target_modules": ("c_attn",)}, "--target-modules c_attn: .* it has q_proj"),
    ],
)
def test_what_a_library_would_refuse_is_refused_in_the_plan(
    tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(small(tmp_path, **settings))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [float(len(d)) for d in columns['difficulty']]", "KeyError .*difficulty"),
        ("return [1.0]", "returned 1 values for 3 completions"),
    ],
)
def test_a_mistake_in_a_reward_is_found_before_anything_is_loaded_or_written(
    tmp_path: Path, body: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def mine(completions, **columns):\n    {body}\n")
    with pytest.raises((RewardError, ValueError), match=message):
        make_plan(small(tmp_path / "adapters", reward=(f"{path}:mine",)))
    assert not (tmp_path / "adapters").exists()


def test_a_run_that_never_made_a_step_leaves_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "calls = []\n"
        "def mine(completions, **columns):\n"
        "    calls.append(completions)\n"
        "    return [0.5 if len(calls) == 1 else 'much' for _ in completions]\n"
    )
    settings = {"reward": (f"{path}:mine",), "max_completion_length": 8, "quiet": True}
    plan = make_plan(small(tmp_path / "adapters", **settings))
    with pytest.raises(ValueError, match="reward 'mine' returned 'much'"):
        train(plan, Display(quiet=True))
    assert not any((tmp_path / "adapters").iterdir())


def test_the_plan_says_that_words_are_counted_as_wrong(tmp_path: Path) -> None:
    """And calls the reward with all that TRL passes and a real row."""
    rows = [{"question": f"q{n}", "answer": "yes", "level": n} for n in range(40)]
    data, path = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    data.write_text("\n".join(map(json.dumps, rows)))
    path.write_text(
        "def mine(completions, prompts, completion_ids, answer, level, trainer_state, log_metric,\n"
        "         log_extra, **columns):\n"
        "    log_metric('level', level[0] + trainer_state.global_step)\n"
        "    return [float(gold in text) for text, gold in zip(completions, answer, strict=True)]\n"
    )
    own = {
        "dataset": str(data),
        "task": "number",
        "reward_set": "none",
        "reward": (f"{path}:mine",),
    }
    [note] = [note for note in make_plan(small(tmp_path, **own)).notes if "no numbers" in note]
    assert "40 of 40" in note and "strict accuracy" in note
    assert not any("no numbers" in note for note in make_plan(small(tmp_path)).notes)


def test_the_plan_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make_plan(small(tmp_path))
    assert torch.rand(1) == expected


def test_the_trainer_is_there_before_anything_is_written(tmp_path: Path) -> None:
    plan = make_plan(small(tmp_path))
    record, display = provenance(plan), Display(quiet=True)
    with open_training_policy(plan) as policy:
        trainer = build_trainer(plan, policy, record, display)
        assert not any(tmp_path.iterdir())
        open_run(plan, record)
    assert trainer.args.output_dir == str(plan.run_dir) and plan.run_dir.is_dir()


@pytest.mark.parametrize("four_bit", [True, False])
def test_the_base_is_asked_without_the_adapter(tmp_path: Path, four_bit: bool) -> None:
    init = True if four_bit else "orthogonal"
    plan = make_plan(small(tmp_path, load_in_4bit=four_bit, init_lora_weights=init))
    record, display = provenance(plan), Display(quiet=True)
    with open_training_policy(plan) as policy:
        plain = evaluate_problems(plan, policy, "", display)
        trainer = build_trainer(plan, policy, record, display)
        open_run(plan, record)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        assert base_items(plan, policy, trainer, display) == plain
        assert all(parameter.requires_grad for parameter in trainer.trained)
        policy.follow(trainer.model)
        assert evaluate_problems(plan, policy, "", display) != plain


# Settings that are not read


@pytest.mark.parametrize(
    ("choice", "settings", "unused"),
    [
        (GENERATE, {"vllm_max_num_seqs": 4}, {"vllm_max_num_seqs"}),
        (
            GENERATE,
            {"vllm_importance_sampling_mode": "token_mask"},
            {"vllm_importance_sampling_mode"},
        ),
        (GENERATE, {"eval_batch_size": 7, "dynamic_sampling": True}, set()),
        (GENERATE, {"dynamic_sampling_rounds": 7}, {"dynamic_sampling_rounds"}),
        (GENERATE, {"num_train_epochs": 2.0}, {"num_train_epochs"}),
        (GENERATE, {"num_train_epochs": 2.0, "max_steps": None}, set()),
        (GENERATE, {"warmup_ratio": 0.1}, {"warmup_ratio"}),
        (GENERATE, {"eval_steps": 3, "num_validation_items": 0}, {"eval_steps"}),
        (GENERATE, {"revision": "main"}, {"revision"}),
        (GENERATE, {"question_column": "q"}, {"question_column"}),
        (VLLM, {"eval_batch_size": 7, "vllm_max_num_seqs": 4}, {"eval_batch_size"}),
        (VLLM, {"vllm_gpu_memory_utilization": 0.5}, {"vllm_gpu_memory_utilization"}),
        (UNSLOTH, {"shared_prefix": False}, {"shared_prefix"}),
    ],
)
def test_a_setting_that_is_not_read_is_said_where_it_was_set(
    tmp_path: Path, choice: Choice, settings: dict, unused: set[str]
) -> None:
    config = small(tmp_path, **settings)
    said = describe_unused(config, find_unused(config, choice, CPU))
    found = {re.match(r"--([\w-]+) ", line)[1].replace("-", "_") for line in said}
    assert found == unused


def test_nothing_is_said_of_what_a_preset_or_a_default_chose(tmp_path: Path) -> None:
    config = small(tmp_path)
    for choice in (GENERATE, VLLM, UNSLOTH):
        assert describe_unused(config, find_unused(config, choice, CPU)) == []
    assert {"shared_prefix", "eval_batch_size"} <= find_unused(config, UNSLOTH, CPU).keys()


def test_the_record_holds_what_is_in_force(tmp_path: Path) -> None:
    plan = make_plan(small(tmp_path, loss_type="cispo"))
    text = dict(describe_plan(plan, ""))
    assert "epsilon_high 5" in text["update"]
    record = json.loads(json.dumps(provenance(plan)))
    assert (record["loss_type"], record["epsilon"], record["epsilon_high"]) == ("cispo", None, 5)
    assert record["importance_sampling_level"] == "token" and record["shared_prefix"] is True
    for name in ("vllm_importance_sampling_mode", "num_train_epochs"):
        assert record[name] is None


def test_vllm_takes_no_cut_distribution(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--top-p 0\.9 with --rollout vllm"):
        check_engine(small(tmp_path, top_p=0.9), VLLM, EMBEDDED_FOLDER)
    check_engine(small(tmp_path, top_p=0.9), GENERATE, EMBEDDED_FOLDER)


# A model that no memory plan is known for


def unplanned(choice: Choice, gpu: bool = True, **settings: Any) -> tuple[dict, str]:
    card = GPU("card", "580", 8.6, 24 * GIB, 20 * GIB) if gpu else None
    return settle_unplanned(TrainConfig(**settings), choice, card, "the family is strange")


def test_an_unknown_family_is_said_and_vllm_gets_its_share_of_what_was_given() -> None:
    assert unplanned(GENERATE, gpu=False) == ({}, "not planned: the family is strange")
    share = {"vllm_gpu_memory_utilization": 0.5}
    settings, said = unplanned(VLLM)
    assert settings == share and "vLLM gets 0.5" in said and "family is strange" in said
    settings, said = unplanned(VLLM, gpu_memory=6.0)
    assert settings == {"vllm_gpu_memory_utilization": 0.125} and "--gpu-memory limits" in said
    assert unplanned(VLLM, vllm_gpu_memory_utilization=0.3)[0]["vllm_gpu_memory_utilization"] == 0.3
    with pytest.raises(ValueError, match=r"^--gpu-memory 6 cannot be kept to: the family"):
        unplanned(GENERATE, gpu_memory=6.0)


def test_the_plan_of_an_unknown_family_says_so(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    plan = make_plan(
        small(tmp_path / "a", model=str(folder), preset=None, target_modules=("dense",))
    )
    rows = dict(describe_plan(plan, ""))
    assert plan.memory is None and "gpt_neox" in rows["memory"]
    assert provenance(plan)["predicted_memory_bytes"] is None
