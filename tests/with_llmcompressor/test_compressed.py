"""fp8, int8 and w4a16 by llm-compressor: read back by the format's rules, damage shows by name."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_grpo.export import ExportProofError, export_model
from lora_grpo.export_config import ExportConfig
from lora_grpo.model import EMBEDDED_FOLDER

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None,
    reason="llm-compressor is not installed here; make test-llmcompressor installs it",
)
FORMATS = ("fp8", "int8", "w4a16")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("compressed") / "out"
    config = ExportConfig(EMBEDDED_FOLDER, FORMATS, (), target, num_items=64)
    result = export_model(config, print)
    print(result.table)
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_the_library_itself_unpacks_what_we_compared(name: str, exported: Path) -> None:
    """compressed-tensors' own decompression lies as near the merged weights as the proof says."""
    folder = exported / name
    merged = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.bfloat16)
    unpacked = AutoModelForCausalLM.from_pretrained(folder)
    unpacked(torch.tensor([[5, 9, 17]]))  # it unpacks when it first runs
    for key, expected in merged.named_parameters():
        module, _, leaf = key.rpartition(".")
        found, wanted = getattr(unpacked.get_submodule(module), leaf).float(), expected.float()
        if "_proj.weight" not in key:
            assert torch.equal(wanted, found), key
            continue
        largest = wanted.abs().amax(-1, keepdim=True)
        steps = {"fp8": 0.08 * wanted.abs() + largest / 448, "int8": 1.1 * largest / 127,
                 "w4a16": largest / 7.5 * 0.6}  # fmt: skip
        assert torch.all((found - wanted).abs() <= steps[name]), key
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]


def test_each_stays_near_the_merged_model(exported: Path) -> None:
    report = json.loads((exported / "export_report.json").read_text())
    for name in FORMATS:
        figures = report["formats"][name]["figures"]
        assert figures["from_merged"]["mean_kl"] < 0.1
        assert figures["accuracy"]["num_items"] == 64


def scale(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("up_proj.weight_scale"))
    tensors[name] = (tensors[name].float() * 1.01).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shift(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith(("v_proj.weight_packed", "v_proj.weight")))
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", [scale, shift])
def test_damage_is_caught(name: str, damage, tmp_path: Path, monkeypatch) -> None:
    from lora_grpo import export_compressed

    prove = export_compressed.prove_compressed
    monkeypatch.setattr(
        export_compressed, "prove_compressed", lambda s, f, n, r: damage(f) or prove(s, f, n, r)
    )
    config = ExportConfig(EMBEDDED_FOLDER, (name,), (), tmp_path / "out", num_prompts=1)
    with pytest.raises(ExportProofError, match=rf"{name}: tensors \("):
        export_model(config, lambda text: None)
