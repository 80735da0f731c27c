"""Exports: one merge for several formats, proofs that damage fails by name, refusals."""

import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_here
from gguf import GGUFReader
from merge_models import (
    change_json,
    fresh_folder,
    make_adapter,
    make_base,
    make_tokenizer,
    merge_only,
    save_adapter,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_grpo.export import formats as export_formats
from lora_grpo.export.command import ExportProofError, build_table, export_model
from lora_grpo.export.config import ExportConfig
from lora_grpo.export.gguf import files as export_gguf
from lora_grpo.export.gguf import llamacpp
from lora_grpo.export.gguf import write as gguf_write
from lora_grpo.export.gguf.write import GGUFModel
from lora_grpo.export.ollama import parse_modelfile
from lora_grpo.merge.command import MergeProofError


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder, which is not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "merged"
    merge_only(make_adapter(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four formats of one adapter, from one call."""
    target = tmp_path_factory.mktemp("exports") / "all"
    config = ExportConfig(
        make_adapter(),
        ("safetensors", "gguf,gguf-adapter", "ollama"),
        ("q4_0",),
        target,
        num_prompts=2,
    )
    merges = []
    with pytest.MonkeyPatch.context() as patch:
        merge = export_formats.merge_adapter
        patch.setattr(export_formats, "merge_adapter", lambda *a: merges.append(a) or merge(*a))
        export_model(config, quiet)
    assert len(merges) == 1
    return target


def test_every_folder_stands_alone(exported: Path) -> None:
    folders = {"safetensors", "gguf", "gguf-adapter", "ollama"}
    assert {path.name for path in exported.iterdir()} == {*folders, "export_report.json"}
    for name in folders:
        there = {path.name for path in (exported / name).iterdir()}
        carried = {"tokenizer.json", "generation_config.json", "LICENSE", "README.md"}
        assert carried | {"chat_template.jinja", "export_report.json"} <= there
        report = json.loads((exported / name / "export_report.json").read_text())
        assert report["passed"] and list(report["formats"]) == [name]
        assert all(check["passed"] for check in report["formats"][name]["checks"])
    assert not list(exported.rglob(".*"))


def test_commands_of_a_run_with_any_name_work_as_printed(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(make_adapter(), tmp_path / "-My Run: v2 (FOLDER)'s 模"))
    target = tmp_path / "to Ollama"
    formats = ("ollama", "gguf-adapter")
    result = export_model(ExportConfig(adapter, formats, ("bf16",), target, num_prompts=1), quiet)
    create, run, lora = map(shlex.split, result.commands)
    assert create[:2] == ["ollama", "create"] and Path(create[4]).name == "Modelfile"
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", create[2]) and run[2] == create[2]
    named = dict(parse_modelfile(Path(create[4]).read_text()))["FROM"]
    files = [word for word in (*create, *lora) if str(target) in word]
    assert len(files) == 3 and all(map(Path.is_file, map(Path, files)))
    assert (target / "ollama" / named).is_file()
    with (target / "ollama" / "README.md").open() as card:
        assert any(shlex.join([*create[:4], "Modelfile"]) == line.strip() for line in card)


def test_the_table_has_only_columns_that_hold_something() -> None:
    distance = {"mean_kl": 1e-4, "greedy_agreement": 1.0}
    accuracy = {"export": {"strict_accuracy": 0.5}, "merged": {"strict_accuracy": 0.5}}
    figures = {"q8_0": {"bytes": 1, "from_merged": distance}, "bf16": {"bytes": 2}}
    lines = build_table({"formats": {"gguf": {"figures": figures}}}).splitlines()
    assert lines[0] == "| format | MB | mean KL from merged | same greedy choice |"
    assert {line.count("|") for line in lines} == {5} and len(lines) == 4
    figures["bf16"]["accuracy"] = {**accuracy, "mcnemar_p": 1.0}
    assert "| strict accuracy | merged | p |" in build_table(
        {"formats": {"g": {"figures": figures}}}
    )


def test_the_adapter_file_adds_what_peft_adds(exported: Path) -> None:
    """PEFT's own merge of the same adapter, weight by weight."""
    adapter = make_adapter()
    base = AutoModelForCausalLM.from_pretrained(make_base(), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    after = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    reader = GGUFReader(next((exported / "gguf-adapter").glob("*.gguf")))
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    a, b = stored["blk.1.ffn_down.weight.lora_a"], stored["blk.1.ffn_down.weight.lora_b"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(alpha / a.shape[0] * b @ a, after[name] - before[name], atol=1e-5)
    assert len(stored) == 2 * 14


def test_a_turn_that_ends_with_another_token_than_eos_stops_every_export(tmp_path: Path) -> None:
    """No padding token either, as with Llama 3's own tokenizer: GGUF then names none."""
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    adapter = save_adapter(tmp_path / "run", base)
    change_json(base / "config.json", eos_token_id=0)
    change_json(base / "generation_config.json", eos_token_id=0)
    change_json(base / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    target = tmp_path / "out"
    export_model(ExportConfig(adapter, ("ollama",), ("bf16",), target, num_prompts=1), quiet)
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    assert "\nPARAMETER stop <|im_end|>\n" in (target / "Modelfile").read_text()
    reader = GGUFReader(next(target.glob("*.gguf")))
    keys = {name: reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    assert [keys["eos"].contents(), keys["eot"].contents()] == [0, end]
    assert reader.get_field("tokenizer.ggml.padding_token_id") is None


def test_patterns_and_rank_stabilised_scaling_reach_the_adapter_file(tmp_path: Path) -> None:
    adapter = save_adapter(
        fresh_folder() / "run", make_base(), use_rslora=True, alpha_pattern={"q_proj": 32}
    )
    target = tmp_path / "out"
    export_model(ExportConfig(adapter, ("gguf-adapter",), (), target, num_prompts=1), quiet)
    assert json.loads((target / "export_report.json").read_text())["passed"]


def scaled(factor: float):
    def change(path, model: GGUFModel, vocabulary, quant, name):
        class Scaled(GGUFModel):
            def read(self, tensor: str) -> np.ndarray:
                values = super().read(tensor)
                return values * np.float32(factor) if tensor == "blk.1.ffn_up.weight" else values

        return path, Scaled(model.config, model.tensors), vocabulary, quant, name

    return change


def without(path, model: GGUFModel, vocabulary, quant, name):
    kept = {name: tensor for name, tensor in model.tensors.items() if "blk.1.attn_v.b" not in name}
    return path, GGUFModel(model.config, kept), vocabulary, quant, name


def with_vocabulary(**change):
    def damage(path, model, vocabulary, quant, name):
        values = {key: make(vocabulary) for key, make in change.items()}
        return path, model, replace(vocabulary, **values), quant, name

    return damage


def with_config(path, model, vocabulary, quant, name):
    config = type(model.config).from_dict({**model.config.to_dict(), "rms_norm_eps": 1e-3})
    return path, GGUFModel(config, model.tensors), vocabulary, quant, name


DAMAGES = {
    "a tensor is 1 % too large": (scaled(1.01), "q8_0", "tensors"),
    "a tensor of four bits is 1 % too large": (scaled(1.01), "q4_0", "tensors"),
    "a tensor of 16 bits is 1 % too large": (scaled(1.01), "bf16", "tensors"),
    "a tensor is missing": (without, "q8_0", "tensors"),
    "the EOS is another": (
        with_vocabulary(special=lambda v: {**v.special, "eos": 0}),
        "q8_0",
        "eos",
    ),
    "two merges are swapped": (
        with_vocabulary(merges=lambda v: [v.merges[1], v.merges[0], *v.merges[2:]]),
        "q8_0",
        "tokenizer",
    ),
    "a token is not marked as special": (
        with_vocabulary(types=lambda v: [1, *v.types[1:]]),
        "q8_0",
        "tokenizer",
    ),
    "the chat template is another": (
        with_vocabulary(chat_template=lambda v: v.chat_template + " "),
        "q8_0",
        "chat_template",
    ),
    "BOS is put in front": (with_vocabulary(add_bos=lambda v: True), "q8_0", "special_tokens"),
    "the norm's epsilon is another": (with_config, "q8_0", "keys"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_caught_by_name(damage: str, merged: Path, tmp_path: Path, monkeypatch) -> None:
    change, quant, name = DAMAGES[damage]
    write = export_gguf.write_model
    monkeypatch.setattr(export_gguf, "write_model", lambda *given: write(*change(*given)))
    target = tmp_path / "out"
    with pytest.raises(ExportProofError, match=rf"gguf: {quant} {name} \(") as caught:
        export_model(ExportConfig(merged, ("gguf",), (quant,), target, num_prompts=1), quiet)
    failures = {c.split(" (")[0].split()[-1] for c in str(caught.value).split("; ") if "gguf" in c}
    assert name in failures
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed.json"]
    assert not json.loads((tmp_path / "out.failed.json").read_text())["passed"]


def test_a_damaged_adapter_file_is_caught(tmp_path: Path, monkeypatch) -> None:
    read_b = gguf_write.read_b
    monkeypatch.setattr(gguf_write, "read_b", lambda *given: read_b(*given) * 1.01)
    config = ExportConfig(make_adapter(), ("gguf-adapter",), (), tmp_path / "out", num_prompts=1)
    with pytest.raises(ExportProofError, match="gguf-adapter: deltas"):
        export_model(config, quiet)


def test_a_merged_folder_is_exported_without_its_adapter(merged: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    config = ExportConfig(merged, ("gguf",), ("bf16", "f16"), target, num_prompts=2)
    result = export_model(config, quiet)
    assert {path.name for path in target.glob("*.gguf")} == {"merged-BF16.gguf", "merged-F16.gguf"}
    assert "| gguf bf16 |" in result.table and len(result.commands) == 2
    assert all(str(target) in command for command in result.commands)


def test_a_merge_that_fails_leaves_its_report(tmp_path: Path, monkeypatch) -> None:
    from lora_grpo.merge import write as merge_weights

    write = merge_weights.cast
    monkeypatch.setattr(merge_weights, "cast", lambda v, d, n: write(v * 1.01, d, n))
    config = ExportConfig(make_adapter(), ("gguf",), (), tmp_path / "out", num_prompts=1)
    with pytest.raises(MergeProofError, match=r"out\.failed\.json"):
        export_model(config, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed.json"]


def test_accuracy_of_each_format_stands_beside_the_merged_models(tmp_path: Path) -> None:
    adapter = make_adapter(max_completion_length=8)
    rows = [{"index": i, "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
    (adapter / "eval_items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (adapter / "eval.json").write_text(json.dumps({"dataset": "mine", "split": "test"}))
    config = ExportConfig(
        adapter, ("safetensors", "gguf"), ("bf16",), tmp_path / "out", num_prompts=1, num_items=4
    )
    report = export_model(config, quiet).report
    for figures in (
        report["formats"]["safetensors"]["figures"],
        report["formats"]["gguf"]["figures"]["bf16"],
    ):
        accuracy = figures["accuracy"]
        assert accuracy["num_items"] == 4
        assert accuracy["export"]["mean_completion_tokens"] == 8
        assert accuracy["merged"].keys() == accuracy["export"].keys()


def test_k_quants_are_refused_without_llamacpp(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(llamacpp.shutil, "which", lambda name: None)
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    config = ExportConfig(make_adapter(), ("gguf",), ("q4_k_m",), tmp_path / "out")
    with pytest.raises(ValueError, match=r"q4_k_m is made by llama\.cpp.*pip install llama-cpp"):
        export_model(config, quiet)
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "no such format": (["--format", "ggml"], "--format ggml: allowed are safetensors, gguf"),
    "no such type": (["--format", "gguf", "--quant", "q3"], "--quant q3: allowed are f16, bf16"),
    "a type for nothing": (["--format", "bnb-4bit", "--quant", "f16"], "--quant is for --format"),
    "no folder": (["--format", "gguf", "--output-dir", "{adapter}"], "exists already and is never"),
    "two types for Ollama": (
        ["--format", "ollama", "--quant", "q8_0,q4_0", "--output-dir", "x"],
        "--format ollama takes one --quant",
    ),
    "no items": (["--format", "gguf", "--num-items", "0"], "--num-items must be at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence(mistake: str, tmp_path: Path) -> None:
    adapter = make_adapter()
    arguments, sentence = MISTAKES[mistake]
    command = [text.format(adapter=adapter) for text in arguments]
    done = run_here("export_model.py", adapter, *command, home=tmp_path)
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == 2 and sentence in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_neither_says_what_to_point_at(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    done = run_here("export_model.py", folder / "checkpoint-5", "--format", "gguf", home=tmp_path)
    assert done.returncode == 2 and f"export_model.py {folder}\n" in done.stderr


def test_a_merge_on_record_as_failed_is_refused(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "merged"))
    (folder / "merge_report.json").write_text("{}")
    change_json(folder / "merge_report.json", passed=False)
    done = run_here("export_model.py", folder, "--format", "gguf", home=tmp_path)
    assert done.returncode == 2 and "failed its proof: merge again" in done.stderr


def test_the_script_exports_and_says_what_next(tmp_path: Path) -> None:
    done = run_here(
        "export_model.py", make_adapter(), "--format", "gguf", "--num-prompts", "1", home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "exported: exports/run-gguf-q8_0" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("next: llama-cli -m exports/run-gguf-q8_0/run-Q8_0.gguf")


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is not None, reason="llm-compressor is installed here"
)
def test_what_llmcompressor_writes_is_refused_without_it(tmp_path: Path) -> None:
    done = run_here("export_model.py", make_adapter(), "--format", "fp8", home=tmp_path)
    assert done.returncode == 2 and "pip install -r requirements-llmcompressor.txt" in done.stderr
    assert list(tmp_path.iterdir()) == []
