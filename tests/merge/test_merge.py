"""A merge equals PEFT's, is proven and reported, and is a plain 16-bit model folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import load_all, make_adapter, make_base, make_tokenizer, merge_only, save_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from lora_grpo.merge.command import MergeConfig, merge_adapter
from lora_grpo.merge.compare import compare_values
from lora_grpo.merge.inputs import plan_merge
from lora_grpo.merge.write import write_weights
from lora_grpo.proof.reference import render_prompts


def merge_with_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("base", "knobs"),
    [
        ({}, {}),
        ({"dtype": "float16", "tied": False}, {"use_rslora": True, "r": 8}),
        ({"dtype": "float32"}, {"target_modules": ["q_proj", "down_proj"]}),
        (
            {"sharded": True},
            {
                "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
                "alpha_pattern": {"q_proj": 12, "self_attn.q_proj": 99, "layers.0.mlp.up_proj": 32},
                "use_rslora": True,
            },
        ),
    ],
)
def test_equals_peft_to_the_last_bit(tmp_path, base, knobs):
    folder = make_base(**base)
    adapter = save_adapter(tmp_path / "run", folder, **knobs)
    plan = merge_only(adapter, tmp_path / "merged")
    expected = "float16" if base.get("dtype") == "float16" else "bfloat16"
    found, reference = load_all(tmp_path / "merged"), merge_with_peft(folder, adapter)
    assert plan.dtype == expected
    assert found.keys() == load_all(folder).keys()
    assert ("lm_head.weight" in found) == (not base.get("tied", True))
    assert all(t.equal(reference[name].to(getattr(torch, expected))) for name, t in found.items())
    assert any(not t.equal(load_all(folder)[name].to(t.dtype)) for name, t in found.items())


def test_fan_in_fan_out_equals_peft(tmp_path):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    base, merged = tmp_path / "base", tmp_path / "merged"
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(base)
    knobs = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapter = save_adapter(tmp_path / "run", base, **knobs)
    plan = plan_merge(adapter, str(base))
    merged.mkdir()
    write_weights(plan, merged)
    reference = merge_with_peft(base, adapter)
    found = load_all(merged)
    assert all(t.equal(reference[name].bfloat16()) for name, t in found.items())


def test_shards_and_index_are_the_bases(tmp_path):
    base = make_base(sharded=True, dtype="float32")
    merge_only(save_adapter(tmp_path / "run", base), tmp_path / "merged")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    found = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(found["weight_map"].values())) > 1
    assert found["weight_map"] == index["weight_map"]
    assert found["metadata"]["total_size"] == index["metadata"]["total_size"] // 2
    for name, file_name in found["weight_map"].items():
        assert name in load_file(tmp_path / "merged" / file_name)


@pytest.mark.parametrize(("dtype", "double_quant"), [("float32", True), ("bfloat16", False)])
def test_dequantized_base_is_the_one_that_4bit_loading_has(tmp_path, dtype, double_quant):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    trained = {"dtype": dtype, "bnb_4bit_use_double_quant": double_quant}
    adapter = make_adapter(load_in_4bit=True, bnb_4bit_quant_type="nf4", **trained)
    merge_only(adapter, tmp_path / "merged", base="dequantized")
    settings_4bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        make_base(), dtype=getattr(torch, dtype), quantization_config=settings_4bit
    )
    model = PeftModel.from_pretrained(model, adapter)
    layers = dict(model.get_base_model().named_modules())
    found, checked = load_all(tmp_path / "merged"), 0
    for name, tensor in found.items():
        layer = layers[name.removesuffix(".weight")] if name.endswith("weight") else None
        if isinstance(getattr(layer, "base_layer", None), Linear4bit):
            weight = layer.base_layer.weight
            delta = layer.get_delta_weight("default").float()
            expected = dequantize_4bit(weight.data, weight.quant_state).float() + delta
            assert tensor.equal(expected.bfloat16())
            checked += 1
    assert checked == 14
    assert found["model.embed_tokens.weight"].equal(
        load_all(make_base())["model.embed_tokens.weight"]
    )


@settings(max_examples=200, deadline=None)
@given(st.floats(-6e4, 6e4, width=32), st.sampled_from([torch.float16, torch.bfloat16]))
def test_the_nearest_value_is_right_and_one_two_steps_away_is_not(value, dtype):
    base, delta = torch.tensor([value]), torch.tensor([0.0])
    merged = base.to(dtype)
    assert compare_values(merged, base, delta)[0] is None
    for end in (-1e5, 1e5):
        toward = torch.tensor([end]).to(dtype)
        wrong = torch.nextafter(torch.nextafter(merged, toward), toward)
        assert wrong.isinf() or "1 of 1 values" in compare_values(wrong, base, delta)[0]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Return an adapter trained in 4-bit, merged and proven, with what was reported."""
    adapter = make_adapter(load_in_4bit=True, dtype="float32", system_prompt="Be brief.")
    question = {"question": "What is 2 + 3?", "answer": "5", "index": 0}
    (adapter / "eval_items.jsonl").write_text(json.dumps(question) + "\n")
    lines: list[str] = []
    target = tmp_path_factory.mktemp("merged") / "run"
    result = merge_adapter(MergeConfig(adapter, target), lines.append)
    return adapter, result, lines


def test_a_merge_is_proven_and_reported(merged):
    _, result, lines = merged
    report = json.loads((result.folder / "merge_report.json").read_text())
    assert report == result.report
    assert report["passed"] and all(check["passed"] for check in report["checks"])
    assert {check["name"] for check in report["checks"]} == {
        *("tensors", "logits", "kl", "greedy", "eos", "tied_embeddings", "tokenizer"),
        *("reload", "config", "generation_config"),
    }
    noise, effect = report["rounding_noise_from_policy"], report["bare_base_from_policy"]
    assert 0 < report["from_policy"]["mean_kl"] < effect["mean_kl"] / 100
    assert 0 < noise["mean_kl"] < effect["mean_kl"] / 100
    assert report["from_4bit_policy"]["mean_kl"] > 10 * report["from_policy"]["mean_kl"]
    assert lines[0].startswith("merging 14 of 26 tensors")
    assert str(report["from_policy"]["positions"]) in (result.folder / "README.md").read_text()


def test_a_merged_folder_is_a_plain_16_bit_model(merged):
    result = merged[1]
    config = json.loads((result.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config and "torch_dtype" not in config
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (result.folder / "LICENSE").read_text() == "Apache-2.0"
    assert sorted(path.name for path in result.folder.parent.iterdir()) == ["run"]
    assert oct(result.folder.stat().st_mode)[-3:] == "755"


def test_the_proof_asks_the_runs_own_questions(merged):
    adapter, result, _ = merged
    prompts = render_prompts(adapter, plan_merge(adapter).style, make_tokenizer(), 8)
    assert len(prompts) == 1
    assert "What is 2 + 3?" in prompts[0] and "Be brief." in prompts[0]
    assert result.report["from_policy"]["positions"] <= 48


def test_a_dequantized_merge_has_no_drift_from_its_policy(tmp_path):
    adapter = make_adapter(load_in_4bit=True, dtype="float32")
    config = MergeConfig(adapter, tmp_path / "out", base="dequantized", num_prompts=2)
    report = merge_adapter(config, lambda line: None).report
    assert "dequantized_base" in {check["name"] for check in report["checks"]}
    assert (
        report["from_4bit_policy"]["mean_kl"] < 4 * report["rounding_noise_from_policy"]["mean_kl"]
    )


def test_an_adapter_below_the_types_resolution_is_warned_of(tmp_path):
    adapter = save_adapter(tmp_path / "run", make_base(), std=1e-6)
    lines: list[str] = []
    merge_adapter(MergeConfig(adapter, tmp_path / "out", num_prompts=1), lines.append)
    assert "rounding to bfloat16 moves the model" in lines[-1]
    assert lines[-1].startswith("warning: ") and lines[-1].endswith("use --dtype float16")


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"eos_token_id": [7, 2]}, {"eos_token_id": [2, 7]}),
        ({"eos_token_id": 9, "temperature": 0.7, "top_k": 20}, {"eos_token_id": [2, 9]}),
        (
            {"eos_token_id": 2, "do_sample": True, "temperature": 0.7},
            {"eos_token_id": [2], "do_sample": True, "temperature": 0.7},
        ),
        (None, {"eos_token_id": [2]}),
    ],
)
def test_generation_config_stops_on_every_eos(tmp_path, declared, expected):
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    (base / "generation_config.json").unlink()
    if declared is not None:
        (base / "generation_config.json").write_text(json.dumps(declared))
    merge_only(make_adapter(), tmp_path / "merged", model=str(base))
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert found == {**expected, "pad_token_id": 0}
    GenerationConfig.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "again")


def test_the_bases_tokenizer_serves_an_adapter_without_one(tmp_path):
    adapter = make_adapter()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    plan = merge_only(adapter, tmp_path / "merged")
    assert plan.tokenizer_folder == plan.base_folder
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_text() == (make_base() / name).read_text()
