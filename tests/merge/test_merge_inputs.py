"""What cannot be merged is refused, in a sentence that says why and what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from merge_models import (
    LINEAR,
    Q_PROJ,
    change_json,
    change_tensor,
    load_all,
    make_adapter,
    make_base,
    merge_only,
    save_adapter,
)
from safetensors.torch import load_file, save_file

from lora_grpo.machine.files import read_json
from lora_grpo.merge.command import MergeConfig, merge_adapter
from lora_grpo.merge.deltas import refuse_unmergeable
from lora_grpo.merge.inputs import plan_merge

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


def change_adapter(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def fill_with(value: float, part: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if part in name:
                tensors[name] = torch.full_like(tensors[name], value)

    return change


def rename(old: str, new: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


TRAINED_EMBEDDINGS = {"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fill_with(0.0, "lora_B"), r"changes nothing .*nothing was learned.*train first"),
        (fill_with(0.0, "lora_A"), "changes nothing"),
        (fill_with(float("nan"), LORA_A), rf"{LORA_A} in .* not finite.*earlier checkpoint"),
        (fill_with(float("inf"), LORA_B), rf"{LORA_B} in .* not finite"),
        (lambda t: t.update(TRAINED_EMBEDDINGS), r"holds .*embed_tokens\.weight, which is no LoRA"),
        (rename("lora_A.weight", "lora_embedding_A"), "which is no LoRA matrix of a linear layer"),
        (lambda t: t.pop(LORA_A), r"lora_B alone for model\.layers\.0\.self_attn\.q_proj"),
        (
            lambda t: t.update({LORA_A: t[LORA_A][:2].clone()}),
            r"lora_A \[2, 64\] .*says rank 4: the two files are not of one adapter",
        ),
        (
            rename("layers.1.", "layers.9."),
            r"changes model\.layers\.9\..* which the base .* does not have: .*--model",
        ),
        (
            lambda t: t.update({LORA_B: t[LORA_B][:8].clone()}),
            rf"changes {Q_PROJ} as \[8, 64\], in the base .* \[64, 64\]: .*--model",
        ),
    ],
)
def test_adapter_weights_that_cannot_be_merged(change, message):
    adapter = make_adapter()
    change_adapter(adapter, change)
    with pytest.raises(ValueError, match=message):
        plan_merge(adapter)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type IA3: only LORA can be merged"),
        ("bias", "lora_only", "bias 'lora_only': trained biases are not merged here"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens"),
        ("init_lora_weights", "pissa_niter_16", "changed the base before training: save .*again"),
        *(
            ("init_lora_weights", start, "changed the base before training")
            for start in ("olora", "loftq", "corda", "lora_ga")
        ),
    ],
)
def test_adapter_configs_that_cannot_be_merged(knob, value, message):
    adapter = make_adapter()
    change_json(adapter / "adapter_config.json", **{knob: value})
    with pytest.raises(ValueError, match=message):
        plan_merge(adapter)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_merged(start):
    refuse_unmergeable({"peft_type": "LORA", "init_lora_weights": start, "bias": "none"})


def leave_a_checkpoint(adapter: Path) -> Path:
    return Path(shutil.copytree(adapter, adapter / "checkpoint-10"))


def save_as_before(adapter: Path) -> Path:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return adapter


def break_config(adapter: Path) -> Path:
    (adapter / "adapter_config.json").write_text("{")
    return adapter


def forget_base(adapter: Path) -> Path:
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    return adapter


@pytest.mark.parametrize(
    ("find", "error", "message"),
    [
        (leave_a_checkpoint, ValueError, r"checkpoint .*merge_adapter.py {adapter}$"),
        (lambda a: a.parent, FileNotFoundError, "no adapter_config.json .*give {adapter}"),
        (lambda a: make_base(), ValueError, r"is a whole model.*evaluate.py --model"),
        (save_as_before, FileNotFoundError, r"holds adapter_model\.bin .*save it again"),
        (break_config, ValueError, r"adapter_config\.json is not JSON"),
        (forget_base, ValueError, "does not say which base .*--model"),
    ],
)
def test_folders_that_cannot_be_merged(find, error, message):
    adapter = make_adapter()
    with pytest.raises(error, match=message.format(adapter=adapter)):
        plan_merge(find(adapter))


def test_the_last_step_is_merged_with_the_records_of_its_run(tmp_path):
    """Its own figures are not on record, so that none go along."""
    run = make_adapter(system_prompt="Be brief.")
    (run / "eval.json").write_text("{}")
    save_adapter(run / "last", make_base())
    plan = merge_only(run / "last", tmp_path / "merged")
    assert plan.style.system_prompt == "Be brief."
    assert read_json(tmp_path / "merged/train_config.json")["system_prompt"] == "Be brief."
    assert not (tmp_path / "merged/eval.json").exists()


def test_another_base_than_the_runs_own(tmp_path):
    adapter = make_adapter(base_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"is not the one .* \(sha256 .* says 000000000000\)"):
        plan_merge(adapter)
    named = plan_merge(adapter, model=str(make_base()))
    assert "is not the one the adapter was trained on" in named.warning
    lines: list[str] = []
    config = MergeConfig(adapter, tmp_path / "out", model=str(make_base()), num_prompts=1)
    report = merge_adapter(config, lines.append).report
    assert report["warnings"] == [named.warning]
    assert f"warning: {named.warning}" in lines


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: change_json(f / "config.json", quantization_config={"bits": 4}),
            ValueError,
            "is quantised already .*16-bit original with --model",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            FileNotFoundError,
            r"has no model\.safetensors, and only safetensors are read",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"short"),
            ValueError,
            r"model\.safetensors is no whole safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"x": "model-00002-of-00002.safetensors"}})
            ),
            FileNotFoundError,
            r"has no model-00002-of-00002\.safetensors",
        ),
    ],
)
def test_bases_that_cannot_be_merged_into(tmp_path, damage, error, message):
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    damage(base)
    with pytest.raises(error, match=message):
        plan_merge(make_adapter(), model=str(base))


def test_a_dequantized_base_needs_a_4bit_run():
    with pytest.raises(ValueError, match=r"--base dequantized is for .*leave --base out"):
        plan_merge(make_adapter(load_in_4bit=False), base="dequantized")
    with pytest.raises(ValueError, match="bnb_4bit_quant_type 'fp4': only nf4"):
        plan_merge(make_adapter(load_in_4bit=True, bnb_4bit_quant_type="fp4"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e5, rf"{Q_PROJ} reaches 1e\+05, more than --dtype float16 holds .*use --dtype bfloat16"),
        (float("nan"), f"{Q_PROJ} is not finite after the merge"),
    ],
)
def test_values_that_the_type_cannot_hold(tmp_path, value, message):
    base = Path(shutil.copytree(make_base(dtype="float32"), tmp_path / "base"))
    adapter = save_adapter(tmp_path / "run", base)
    change_tensor(base, Q_PROJ, lambda t: t.index_fill(0, torch.tensor([1]), value))
    with pytest.raises(ValueError, match=message):
        merge_only(adapter, tmp_path / "merged", dtype="float16")


def test_flags_are_checked_before_anything_loads(tmp_path):
    with pytest.raises(ValueError, match="--num-prompts must be at least 1, got 0"):
        MergeConfig(make_adapter(), num_prompts=0)
    with pytest.raises(ValueError, match=rf"ADAPTER_DIR {tmp_path}/none is no directory"):
        MergeConfig(tmp_path / "none")
    with pytest.raises(ValueError, match=re.escape(f"--output-dir {tmp_path} exists already")):
        MergeConfig(make_adapter(), tmp_path)
    assert MergeConfig(make_adapter()).target == Path("merged/run")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"target_modules": [*LINEAR, "embed_tokens"]}, "lora_embedding_A.* merge_and_unload"),
        ({"target_modules": [*LINEAR, "lm_head"]}, "changes lm_head, .* ties its embeddings"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save .*merge_and_unload"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices .*merge_and_unload"),
        ({"use_dora": True}, "use_dora True: only plain LoRA .*merge_and_unload"),
    ],
)
def test_adapters_of_more_than_linear_layers(tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        plan_merge(save_adapter(tmp_path / "run", make_base(), **knobs))


def test_copies_of_the_bases_embeddings_change_nothing(tmp_path):
    """PEFT saves them beside LoRA on the output layer, and Unsloth beside any."""
    base = make_base(tied=False)
    adapter = save_adapter(tmp_path / "run", base, target_modules=[*LINEAR, "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_all(adapter)
    plan = plan_merge(adapter)
    assert "lm_head.weight" in plan.deltas and len(plan.deltas) == 15
    change_adapter(adapter, lambda t: t["base_model.model.lm_head.base_layer.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight, which is no LoRA"):
        plan_merge(adapter)
