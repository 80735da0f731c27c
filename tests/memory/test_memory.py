"""The terms against real tensors: weights, adapters, optimisers, and TRL's own update."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_cases import TOKENS, adapted, job_of, load, saved_bytes, small_config
from transformers import Qwen3Config, Qwen3ForCausalLM

from lora_grpo.config.train_config import LINEAR_LAYERS
from lora_grpo.machine.allocator import has_huge_pages
from lora_grpo.memory.rollout import predict
from lora_grpo.memory.shape import PUBLISHED, build_shape
from lora_grpo.memory.terms import Job, adapter_terms, optimiser_bytes, weight_terms
from lora_grpo.memory.update import activation_terms

OWN_UPDATE = {"shared_prefix": False, "max_completion_length": TOKENS - 16 + 1}


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_weights_take_what_bitsandbytes_takes(
    tiny_model_folder: Path, double_quant: bool
) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load(tiny_model_folder, True, double_quant)
    real = 0
    for layer in (layer for layer in model.modules() if isinstance(layer, Linear4bit)):
        state = layer.weight.quant_state
        real += layer.weight.nbytes + state.absmax.nbytes
        real += state.state2.absmax.nbytes if double_quant else 0
    config = small_config(bnb_4bit_use_double_quant=double_quant)
    linear = weight_terms(job_of(tiny_model_folder, config))[0]
    assert linear.bytes == pytest.approx(real, rel=0.005)


def test_whole_weights_and_the_adapter_are_exact(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, False)
    job = job_of(tiny_model_folder, small_config(load_in_4bit=False))
    assert sum(term.bytes for term in weight_terms(job)) == sum(
        parameter.nbytes for parameter in model.parameters()
    )
    trained = [p for p in adapted(model, LINEAR_LAYERS).parameters() if p.requires_grad]
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


@pytest.mark.parametrize(
    ("settings", "four_bit"),
    [
        ({}, False),
        ({"gradient_checkpointing": True}, True),
        ({"target_modules": ("q_proj", "v_proj")}, False),
        ({"lora_dropout": 0.1}, True),
    ],
)
def test_trls_own_update_saves_what_is_predicted(
    tiny_model_folder: Path, settings: dict, four_bit: bool
) -> None:
    config = small_config(load_in_4bit=four_bit, **OWN_UPDATE, **settings)
    model = adapted(
        load(tiny_model_folder, four_bit), config.target_modules, lora_dropout=config.lora_dropout
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    predicted = sum(term.bytes for term in activation_terms(job_of(tiny_model_folder, config)))
    assert predicted == pytest.approx(saved_bytes(model.train()), rel=0.04)


def test_qwen3_saves_its_norms_of_each_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    settings = Qwen3Config(**sizes, **heads)
    settings.save_pretrained(tmp_path)
    model = adapted(Qwen3ForCausalLM(settings), LINEAR_LAYERS).train()
    job = job_of(tmp_path, small_config(load_in_4bit=False, **OWN_UPDATE))
    predicted = sum(term.bytes for term in activation_terms(job))
    assert predicted == pytest.approx(saved_bytes(model), rel=0.04)


def test_a_sleeping_vllm_holds_its_cache_only_while_it_generates() -> None:
    shape = build_shape(PUBLISHED["Qwen/Qwen3-0.6B"], "there")
    job = Job(shape, small_config(), "transformers", "vllm", "cuda", "bfloat16", 16)
    for phase in predict(job).phases:
        names = {term.name for term in phase.terms}
        assert ("vLLM's KV cache" in names) == (phase.name == "generation")
        assert ("vLLM's weights" in names) == (phase.name == "generation")
    own, shared = (predict(replace(job, backend=name)) for name in ("transformers", "unsloth"))
    weights = sum(term.bytes for term in weight_terms(job))
    assert own.phases[0].bytes - shared.phases[0].bytes == weights


@pytest.mark.skipif(not has_huge_pages(), reason="the kernel gives no huge pages")
def test_freed_tensors_leave_a_wide_models_update() -> None:
    """Freed from the middle of many, a tensor leaves a hole in the heap, or leaves the process."""
    code = """
import os, torch
from lora_grpo.machine.allocator import giving_back, prepare_allocator
prepare_allocator()
large = torch.ones(2**23 - 2**12)
del large  # from now on glibc keeps what is smaller in its heap
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for hidden_size in (128, 576):
    with torch.no_grad(), giving_back(hidden_size) as given:
        rows = [torch.ones(2**21) for _ in range(50)]
        before = resident()
        del rows[::2]
        print(given, before - resident() > 150e6)
    del rows
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "True"]
