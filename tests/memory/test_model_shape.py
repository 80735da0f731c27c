"""The shape from config.json alone against transformers' own models, built without memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import LINEAR_LAYERS, TrainConfig
from lora_grpo.memory.shape import PUBLISHED, build_shape, find_shape, read_shape

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
BARE = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
CONFIGS = [
    ("llama", SMALL),
    ("llama", SMALL | {"head_dim": 12}),
    ("llama", SMALL | {"tie_word_embeddings": True, "head_dim": None}),
    ("llama", BARE),
    ("qwen2", SMALL),
    ("qwen2", SMALL | {"tie_word_embeddings": True}),
    ("qwen2", BARE | {"num_attention_heads": 32, "hidden_size": 64}),
    ("qwen3", SMALL | {"head_dim": 16, "tie_word_embeddings": True}),
    ("qwen3", SMALL),
]


def meta_model(values: dict[str, Any], folder: Path) -> torch.nn.Module:
    (folder / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize(("family", "values"), CONFIGS)
def test_counts_equal_those_of_the_real_model(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    model = meta_model({"model_type": family, **values}, tmp_path)
    shape = read_shape(tmp_path)
    linear = [
        (name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]
    sizes = {name: (module.in_features, module.out_features) for name, module in linear}
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.linear_parameters == sum(module.weight.numel() for _, module in linear)
    assert shape.linear_layers == sizes
    for targets in (LINEAR_LAYERS, ("q_proj", "down_proj")):
        expected = 5 * sum(sum(sizes[name]) for name in targets) * shape.layers
        assert shape.lora_parameters(5, targets) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_build_and_have_the_size_in_their_name(
    name: str, tmp_path: Path
) -> None:
    model = meta_model(PUBLISHED[name], tmp_path)
    shape = read_shape(tmp_path)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    known = {"135M": 134_515_008, "2.5-0.5B": 494_032_768, "1.5B": 1_543_714_304}
    known |= {"3B": 3_085_938_688, "0.6B": 596_049_920}
    assert shape.parameters == next(size for key, size in known.items() if key in name)


def test_every_preset_can_be_planned_without_the_hub() -> None:
    models = {preset.get("model", TrainConfig.model) for preset in PRESETS.values()}
    assert models - {"tiny"} <= PUBLISHED.keys()


def test_a_family_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"family mamba: .* llama, qwen2, qwen3"):
        build_shape({"model_type": "mamba", **SMALL}, "there")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"config.json gives no intermediate_size, num_hidden"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_shape(tmp_path)


def test_a_target_that_the_model_lacks_is_named() -> None:
    shape = build_shape({"model_type": "llama", **SMALL}, "there")
    with pytest.raises(ValueError, match=r"--target-modules fc1: .* q_proj k_proj"):
        shape.lora_parameters(8, ("fc1",))


def test_the_published_shape_is_taken_where_the_hub_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silent(*arguments: object, **more: object) -> Path:
        raise FileNotFoundError("no network")

    monkeypatch.setattr("lora_grpo.policy.base.resolve_model", silent)
    shape, source = find_shape(TrainConfig())
    assert shape.layers == 24
    assert source.startswith("shape of Qwen/Qwen2.5-0.5B-Instruct as published")
    with pytest.raises(FileNotFoundError, match="no network"):
        find_shape(TrainConfig(model="owner/unknown"))
