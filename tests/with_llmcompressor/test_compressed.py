"""fp8, int8 and w4a16 by llm-compressor: loaded again and compared, damage shows by name."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_grpo.export import compressed
from lora_grpo.export.command import export_model
from lora_grpo.export.config import ExportConfig
from lora_grpo.policy.base import EMBEDDED_FOLDER

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None,
    reason="llm-compressor is not installed here; make test-llmcompressor installs it",
)
FORMATS = ("fp8", "int8", "w4a16")


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """What each format's proof was called with, of one export; its folder is a copy."""
    target, given = tmp_path_factory.mktemp("compressed"), {}
    prove = compressed.prove_compressed

    def remember(source, folder, name, *others):
        given[name] = (source, Path(shutil.copytree(folder, target / name)), name, *others)
        return prove(source, folder, name, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed, "prove_compressed", remember)
        config = ExportConfig(EMBEDDED_FOLDER, FORMATS, (), target / "out", num_items=64)
        print(export_model(config, print).table)
    return given


@pytest.fixture(scope="module")
def exported(proven: dict[str, tuple]) -> Path:
    return proven["fp8"][1].parent / "out"


def test_gptq_stays_nearer_than_rounding_to_nearest(exported: Path) -> None:
    figures = json.loads((exported / "export_report.json").read_text())["formats"]["w4a16"]
    assert "GPTQ on 128 built-in problems" in figures["figures"]["weights"]
    assert figures["figures"]["from_merged"]["mean_kl"] < 0.01  # rounded to nearest: 0.03


def test_each_stays_near_the_merged_model(exported: Path) -> None:
    report = json.loads((exported / "export_report.json").read_text())
    for name in FORMATS:
        figures = report["formats"][name]["figures"]
        assert figures["from_merged"]["mean_kl"] < 0.1
        assert figures["accuracy"]["num_items"] == 64


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def scale(tensors: dict[str, torch.Tensor]) -> None:
    name = next(key for key in tensors if key.endswith("up_proj.weight_scale"))
    tensors[name] = (tensors[name].float() * 1.01).to(tensors[name].dtype)


def shift(tensors: dict[str, torch.Tensor]) -> None:
    name = next(key for key in tensors if key.endswith(("v_proj.weight_packed", "v_proj.weight")))
    tensors[name] = tensors[name].roll(1, 0)


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight_packed"][7, 3] ^= 1


def shrink_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] *= 0.99


def leave_one_whole(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for key in [key for key in tensors if key.startswith(name)]:
        del tensors[key]
    tensors[name] = load_file(EMBEDDED_FOLDER / "model.safetensors")[name].bfloat16()


def change_config(folder: Path, change) -> None:
    said = json.loads((folder / "config.json").read_text())
    change(said)
    (folder / "config.json").write_text(json.dumps(said))


def whole_activations(said: dict) -> None:
    said["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None


def ignore_a_layer(said: dict) -> None:
    said["quantization_config"]["ignore"].append("model.layers.0.self_attn.k_proj")


DAMAGES = {
    "a scale is 1 % too large": (change_tensors, scale, FORMATS, "tensors"),
    "rows have moved": (change_tensors, shift, FORMATS, "tensors"),
    "one 4-bit code has another last bit": (change_tensors, flip_a_bit, ("w4a16",), "tensors"),
    "a norm is 1 % too small": (change_tensors, shrink_norm, FORMATS, "tensors"),
    "a layer is not quantised": (change_tensors, leave_one_whole, ("int8",), "tensors"),
    "activations stay whole": (change_config, whole_activations, ("fp8", "int8"), "quantization"),
    "a layer is read as whole": (change_config, ignore_a_layer, ("w4a16",), "quantization"),
    "positions turn faster": (
        change_config,
        lambda said: said["rope_parameters"].update(rope_theta=500.0),
        FORMATS,
        "config",
    ),
    "the EOS is another": (
        lambda folder, change: (folder / "generation_config.json").write_text(change),
        '{"eos_token_id": [1]}',
        FORMATS,
        "eos",
    ),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for damage, (_, _, names, _) in DAMAGES.items() for name in names],
)
def test_damage_is_caught_by_name(name: str, damage: str, tmp_path: Path, proven) -> None:
    how, what, _, check = DAMAGES[damage]
    source, folder, *given = proven[name]
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    how(damaged, what)
    found = compressed.prove_compressed(source, damaged, *given)
    assert check in {one.name for one in found.checks if not one.passed}


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_that_nobody_damaged_passes(name: str, proven) -> None:
    assert all(check.passed for check in compressed.prove_compressed(*proven[name]).checks)
