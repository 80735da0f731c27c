"""The pre-quantised 4-bit folder: loads by itself, equals what bitsandbytes makes, damage shows."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from merge_models import change_json, fresh_folder, make_adapter, merge_only
from transformers import AutoModelForCausalLM

from lora_grpo.export import bnb as export_bnb
from lora_grpo.export.command import ExportProofError, export_model
from lora_grpo.export.config import ExportConfig


def export(target: Path) -> None:
    folder = fresh_folder() / "merged"
    merge_only(make_adapter(), folder)
    config = ExportConfig(folder, ("bnb-4bit",), (), target, num_prompts=2)
    export_model(config, lambda text: None)


def test_the_folder_loads_as_4bit_by_itself(tmp_path: Path) -> None:
    export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 14
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "LICENSE", "README.md", "generation_config.json"} <= there
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    names = {check["name"] for check in report["formats"]["bnb-4bit"]["checks"]}
    assert {"tensors", "quantization", "eos", "tokenizer", "tied_embeddings"} <= names


def scale(model: torch.nn.Module, folder: Path) -> None:
    layer = next(layer for layer in model.modules() if isinstance(layer, Linear4bit))
    state = layer.weight.quant_state
    (state.state2 if state.nested else state).absmax.mul_(1.01)


def scale_norm(model: torch.nn.Module, folder: Path) -> None:
    model.model.norm.weight.data.mul_(1.01)


DAMAGES = {
    "a 4-bit weight is 1 % too large": (scale, None, "tensors"),
    "a norm is 1 % too large": (scale_norm, None, "tensors"),
    "the EOS is another": (None, {"generation_config.json": {"eos_token_id": [1]}}, "eos"),
    "positions turn faster": (None, {"config.json": {"rope_parameters": {"rope_type": "default",
                              "rope_theta": 500.0}}}, "config"),
    "the tokenizer is another": (None, {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}},
                                 "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_caught_by_name(damage: str, tmp_path: Path, monkeypatch) -> None:
    change, files, name = DAMAGES[damage]
    prove, load = export_bnb.prove_bnb, export_bnb.load_base

    def load_damaged(*given):
        model = load(*given)
        if change:
            change(model, tmp_path)
        return model

    def damaged(source, folder, *given):
        for file, values in (files or {}).items():
            change_json(folder / file, **values)
        return prove(source, folder, *given)

    monkeypatch.setattr(export_bnb, "load_base", load_damaged)
    monkeypatch.setattr(export_bnb, "prove_bnb", damaged)
    with pytest.raises(ExportProofError, match=rf"bnb-4bit: {name} \("):
        export(tmp_path / "out")
