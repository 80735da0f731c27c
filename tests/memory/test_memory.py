"""The terms against real tensors: weights, adapters, optimisers, and what autograd saves."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import job_of, load, saved_bytes, small_config
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from lora_grpo.config.train_config import LINEAR_LAYERS
from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PromptStyle, build_messages, count_tokens, has_system_role, render
from lora_grpo.machine.allocator import has_huge_pages
from lora_grpo.memory.command import LightTokenizer
from lora_grpo.memory.rollout import predict
from lora_grpo.memory.shape import build_shape
from lora_grpo.memory.terms import Job, adapter_terms, nf4_bytes, optimiser_bytes, weight_terms
from lora_grpo.memory.update import activation_terms, saved_per_token


def adapted(model: torch.nn.Module, **more: Any) -> torch.nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(LINEAR_LAYERS), r=16, **more)
    return get_peft_model(model, config)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_weights_take_what_bitsandbytes_takes(
    tiny_model_folder: Path, double_quant: bool
) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load(tiny_model_folder, True, double_quant)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    real = 0
    for layer in layers:
        state = layer.weight.quant_state
        real += layer.weight.nbytes + state.absmax.nbytes
        real += state.state2.absmax.nbytes if double_quant else 0
    config = small_config(bnb_4bit_use_double_quant=double_quant)
    linear = weight_terms(job_of(tiny_model_folder, config))[0]
    assert linear.bytes == pytest.approx(real, rel=0.005)


def test_bits_a_weight_are_those_of_the_paper() -> None:
    assert nf4_bytes(2**20, False) * 8 / 2**20 == 4.5
    assert nf4_bytes(2**20, True) * 8 / 2**20 == pytest.approx(4.127, abs=0.001)


def test_whole_weights_and_the_adapter_are_exact(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, False)
    job = job_of(tiny_model_folder, small_config(load_in_4bit=False))
    assert sum(term.bytes for term in weight_terms(job)) == sum(
        parameter.nbytes for parameter in model.parameters()
    )
    trained = [p for p in adapted(model).parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    states = [
        value.nbytes for state in optimiser.state.values() for value in state.values() if value.ndim
    ]
    weights, state = adapter_terms(job)
    assert weights.bytes == sum(parameter.nbytes for parameter in trained)
    assert state.bytes == sum(states)


@pytest.mark.parametrize(
    ("optim", "each"), [("adamw_torch", 8), ("paged_adamw_8bit", 2), ("sgd", 0), ("lion_32bit", 4)]
)
def test_state_by_optimiser(optim: str, each: int) -> None:
    assert optimiser_bytes(optim) == each


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(
    tiny_model_folder: Path, four_bit: bool, checkpointing: bool
) -> None:
    model = adapted(load(tiny_model_folder, four_bit))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    config = small_config(gradient_checkpointing=checkpointing, load_in_4bit=four_bit)
    predicted = sum(term.bytes for term in activation_terms(job_of(tiny_model_folder, config)))
    assert predicted == pytest.approx(saved_bytes(model), rel=0.02)


@pytest.mark.parametrize(
    ("targets", "dropout"), [(("q_proj", "v_proj"), 0.0), (LINEAR_LAYERS, 0.1), (("up_proj",), 0.0)]
)
def test_other_adapters_save_what_is_predicted(
    tiny_model_folder: Path, targets: tuple[str, ...], dropout: float
) -> None:
    base = load(tiny_model_folder, False)
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=list(targets), r=16, lora_dropout=dropout
    )
    model = get_peft_model(base, lora).train()
    model.enable_input_require_grads()
    config = small_config(target_modules=targets, lora_dropout=dropout, load_in_4bit=False)
    predicted = sum(term.bytes for term in activation_terms(job_of(tiny_model_folder, config)))
    assert predicted == pytest.approx(saved_bytes(model), rel=0.04)


def test_qwen3_saves_its_norms_of_each_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    settings = Qwen3Config(**sizes, **heads)
    settings.save_pretrained(tmp_path)
    model = adapted(Qwen3ForCausalLM(settings)).train()
    config = small_config(load_in_4bit=False)
    predicted = sum(term.bytes for term in activation_terms(job_of(tmp_path, config)))
    assert predicted == pytest.approx(saved_bytes(model), rel=0.04)


def test_bfloat16_halves_all_but_the_norms(tiny_model_folder: Path) -> None:
    whole = job_of(tiny_model_folder, small_config())
    half = dataclasses.replace(whole, dtype="bfloat16")
    assert saved_per_token(whole) / 2 < saved_per_token(half) < saved_per_token(whole)


def test_the_peak_is_what_is_always_there_and_the_fullest_phase(tiny_model_folder: Path) -> None:
    found = predict(job_of(tiny_model_folder, small_config()))
    assert found.peak_bytes == sum(term.bytes for term in found.always) + max(
        phase.bytes for phase in found.phases
    )
    assert {"generation", "evaluation", "loading"} < {phase.name for phase in found.phases}


def test_a_sleeping_vllm_holds_its_cache_only_while_it_generates() -> None:
    shape = build_shape(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 128,
        },
        "there",
    )
    config = small_config()
    job = Job(shape, config, "transformers", "vllm", "cuda", "bfloat16", 16)
    shared = dataclasses.replace(job, backend="unsloth")
    for phase in predict(job).phases:
        names = {term.name for term in phase.terms}
        assert ("vLLM's KV cache" in names) == (phase.name == "generation")
        assert ("vLLM's weights" in names) == (phase.name == "generation")
    assert "vLLM's weights" not in {t.name for p in predict(shared).phases for t in p.terms}
    assert "vLLM's KV cache" in {term.name for term in predict(job).terms}


def test_chunks_and_checkpointing_lower_what_they_should(tiny_model_folder: Path) -> None:
    big = small_config(per_device_train_batch_size=64, max_completion_length=512)
    plain, frugal = (
        predict(job_of(tiny_model_folder, dataclasses.replace(big, **changed))).fullest.bytes
        for changed in ({}, {"gradient_checkpointing": True})
    )
    assert frugal < plain


@pytest.mark.skipif(not has_huge_pages(), reason="the kernel gives no huge pages")
@pytest.mark.parametrize(("hidden_size", "expected"), [(576, True), (128, False)])
def test_freed_tensors_leave_a_wide_models_update(hidden_size: int, expected: bool) -> None:
    """Freed from the middle of many, a tensor leaves a hole in the heap, or leaves the process."""
    code = f"""
import os, torch
from lora_grpo.machine.allocator import giving_back, prepare_allocator
prepare_allocator()
large = torch.ones(2**23 - 2**12)
del large  # from now on glibc keeps what is smaller in its heap
with torch.no_grad(), giving_back({hidden_size}) as given:
    rows = [torch.ones(2**21) for _ in range(50)]
    page = os.sysconf("SC_PAGE_SIZE")
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
    before = resident()
    del rows[::2]
    print(given, before - resident() > 150e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected)] * 2


def test_the_light_tokenizer_knows_templates_that_refuse(tiny_model_folder, tmp_path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + "{{ strftime_now('%Y') }}" + template)
    assert not has_system_role(LightTokenizer(folder))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        LightTokenizer(folder)


def test_the_light_tokenizer_counts_as_the_real_one(tiny_model_folder: Path, tokenizer) -> None:
    questions = ["What is 2 + 3?", "Ann has 12 apples\nand eats 5 of them."]
    style = PromptStyle("Think.", Problem(1, "1 + 1?", "2"))
    light = LightTokenizer(tiny_model_folder)
    for question in questions:
        texts = [render(kind, build_messages(question, style)) for kind in (light, tokenizer)]
        assert texts[0] == texts[1]
        assert count_tokens(light, texts) == count_tokens(tokenizer, texts)
