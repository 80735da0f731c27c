"""Bases whose weights or chat template are unlike the embedded model's: training, evaluation and
chat see one text, and what cannot work is refused before any weights load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merge_models import LINEAR, save_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.prompt import build_messages, render
from lora_grpo.deploy.chat import ChatConfig, chat
from lora_grpo.merge.inputs import plan_merge
from lora_grpo.policy.adapter import read_record
from lora_grpo.policy.base import Placement, load_base, load_tokenizer, quantization
from lora_grpo.results.evaluate import EvaluateConfig, evaluate, prepare
from lora_grpo.train.plan import describe_plan, make_plan

PREFILL = "<reasoning>\n"
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<reasoning>\n' }}{% endif %}"
)
CPU = Placement("cpu", "float32")


def change(path: Path, **values: object) -> None:
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**held, **values}))


def copy_model(source: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(source, folder)
    change(folder / "config.json", **config)
    return folder


@pytest.fixture(scope="session")
def nf4_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as pre-quantised repositories hold theirs."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder,
        dtype=torch.bfloat16,
        quantization_config=quantization(True, True, "bfloat16"),
    )
    model.save_pretrained(folder)
    load_tokenizer(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(nf4_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in NF4; the template refuses a system turn, begins each answer, and ends turns with a
    token that is not EOS."""
    other = {"eos_token_id": 0}
    folder = copy_model(nf4_folder, tmp_path_factory.mktemp("bases") / "odd", **other)
    change(folder / "generation_config.json", **other)
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def plan_for(base: Path, adapters: Path, **knobs: object):
    small = {
        **PRESETS["tiny"],
        "preset": "tiny",
        "max_steps": 2,
        "num_generations": 4,
        "max_completion_length": 32,
        "per_device_train_batch_size": 8,
        "num_eval_items": 4,
        "num_validation_items": 4,
        "log_completions_steps": 1,
    }
    return make_plan(
        TrainConfig(**{**small, **knobs, "model": str(base), "adapters_dir": adapters})
    )


@pytest.fixture(scope="module")
def run_dir(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lora_grpo.train.console import Display
    from lora_grpo.train.run import train

    plan = plan_for(base, tmp_path_factory.mktemp("adapters"), run_name="odd")
    train(plan, Display(quiet=True))
    return plan.run_dir


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_plan_says_what_is_unusual(base: Path, tmp_path: Path) -> None:
    plan = plan_for(base, tmp_path)
    assert plan.config.load_in_4bit
    said = " ".join(text for _, text in describe_plan(plan, ""))
    for part in ("NF4", "merge_adapter.py --model", "system", repr(PREFILL), "<|im_end|>"):
        assert part in said


def test_training_and_evaluation_score_the_text_that_the_template_began(run_dir: Path) -> None:
    sampled = read_rows(run_dir / "completions.jsonl")
    items = read_rows(run_dir / "eval_items.jsonl")
    texts = [row["completion"] for row in sampled]
    texts += [row[side]["completion"] for row in items for side in ("base", "adapter")]
    assert all(text.startswith(PREFILL) for text in texts)
    assert any(text.count(PREFILL) == 1 for text in texts)
    # Such an answer could not be in the format without the tag that the template wrote.
    assert any(row["rewards"]["format"] > 0 for row in sampled)
    # The turn's own token ends a completion, though the model's files name another.
    assert not all(row["truncated"] for row in sampled)
    assert not all(row["base"]["truncated"] for row in items)


@pytest.mark.parametrize("part", ["", "last"])
def test_evaluation_finds_the_run_s_own_data_and_settings(run_dir: Path, part: str) -> None:
    asked = prepare(EvaluateConfig(run_dir / part))
    recorded = json.loads((run_dir / "train_config.json").read_text())
    assert asked.load_in_4bit and asked.max_completion_length == 32
    assert [problem.question for problem in asked.problems] == [
        row["question"] for row in read_rows(run_dir / "eval_items.jsonl")
    ]
    assert asked.style.system_prompt == recorded["system_prompt"]
    assert (asked.style.system_role, asked.style.prefill) == (False, PREFILL)


def test_evaluation_and_chat_repeat_the_run_s_own_answers(run_dir: Path, capsys) -> None:
    report = evaluate(EvaluateConfig(run_dir))
    recorded = json.loads((run_dir / "eval.json").read_text())
    assert report["adapter"] == recorded["adapter"] and report["base"] == recorded["base"]
    item = read_rows(run_dir / "eval_items.jsonl")[0]
    chat(ChatConfig(run_dir, ask=item["question"], json=True))
    assert json.loads(capsys.readouterr().out)["completion"] == item["adapter"]["completion"]


def test_a_merged_folder_is_asked_as_its_run_was(run_dir: Path, tiny_model_folder, tmp_path):
    merged = copy_model(tiny_model_folder, tmp_path / "merged")
    for name in ("train_config.json", "eval.json", "eval_items.jsonl", "chat_template.jinja"):
        shutil.copy(run_dir / name, merged)
    asked = prepare(EvaluateConfig(model=str(merged)))
    assert (len(asked.problems), asked.max_completion_length) == (4, 32)
    assert asked.style.prefill == PREFILL and not asked.load_in_4bit


def test_stored_nf4_weights_are_those_of_loading_in_4bit(
    nf4_folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """The stored model was quantised from bfloat16 by the same code."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        stored, loaded = (
            load_base(folder, CPU, load_in_4bit=True).eval()(ids).logits
            for folder in (nf4_folder, tmp_path)
        )
    assert stored.dtype == torch.float32
    # Their scales come from bfloat16 and float32 numbers.
    assert (stored - loaded).abs().max() < 0.02 * loaded.abs().max()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, "fp4"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "is never run"),
        ({"model_type": "unheard-of"}, "unheard-of"),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused_in_the_plan(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch, config: dict, named: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    folder = copy_model(tiny_model_folder, tmp_path / "base", **config)
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match=named):
        plan_for(folder, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_a_bin_base_is_said_before_training(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny_model_folder, tmp_path / "base")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    said = " ".join(text for _, text in describe_plan(plan_for(folder, tmp_path / "a"), ""))
    assert ".bin" in said and "save_pretrained" in said


@pytest.mark.parametrize("whole_modules", [["embed_tokens", "lm_head"], None])
def test_an_adapter_with_a_larger_vocabulary_is_evaluated(
    tiny_model_folder: Path, tmp_path: Path, whole_modules: list[str] | None
) -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.add_tokens(["<extra>", "<|pad|>"], special_tokens=True)
    tokenizer.pad_token = "<|pad|>"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(r=2, target_modules=LINEAR, modules_to_save=whole_modules)
    get_peft_model(model, config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "a")
    report = evaluate(
        EvaluateConfig(tmp_path / "a", dataset="arithmetic", num_items=4, max_completion_length=48)
    )
    # A fresh LoRA changes nothing, so the base with more rows answers as it did without.
    assert report["adapter"] == report["base"]


def test_a_base_that_is_gone_is_named_by_its_record(tiny_model_folder: Path, tmp_path) -> None:
    adapter = save_adapter(tmp_path / "a", tiny_model_folder, std=0.1, target_modules=LINEAR)
    change(adapter / "adapter_config.json", base_model_name_or_path="/gone/base")
    with pytest.raises(
        FileNotFoundError, match=r"/gone/base, which .*adapter_config\.json"
    ) as error:
        read_record(adapter).find_base()
    assert "with --model" in str(error.value) and "--preset" not in str(error.value)
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="--model"):
        prepare(EvaluateConfig(adapter))


def test_evaluation_and_merge_read_one_template(tiny_model_folder: Path, tmp_path) -> None:
    """The adapter's own, which chat and every export read."""
    adapter = save_adapter(tmp_path / "a", tiny_model_folder, std=0.1, target_modules=LINEAR)
    load_tokenizer(tiny_model_folder).save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    asked, merged = prepare(EvaluateConfig(adapter)), plan_merge(adapter)
    text = render(asked.tokenizer, build_messages("Why?", asked.style))
    assert text.endswith(PREFILL) and asked.style == merged.style
    assert merged.tokenizer_folder == adapter


@pytest.mark.parametrize("names", [["default", "tool_use"], ["only"]])
def test_of_named_templates_the_default_is_used(tiny_model_folder, tmp_path, names) -> None:
    folder = copy_model(tiny_model_folder, tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    listed = [{"name": name, "template": template} for name in names]
    change(folder / "tokenizer_config.json", chat_template=listed)
    assert load_tokenizer(folder).chat_template == template
    listed = [{"name": name, "template": template} for name in ("a", "b")]
    change(folder / "tokenizer_config.json", chat_template=listed)
    with pytest.raises(ValueError, match="a, b"):
        load_tokenizer(folder)


def test_padding_that_the_base_cannot_embed_is_replaced(tiny_model_folder, tmp_path) -> None:
    adapter = save_adapter(tmp_path / "a", tiny_model_folder, std=0.1, target_modules=LINEAR)
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(adapter)
    asked = prepare(EvaluateConfig(adapter))
    weights = load_file(tiny_model_folder / "model.safetensors")
    assert asked.tokenizer.pad_token_id < len(weights["model.embed_tokens.weight"])
