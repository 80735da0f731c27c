"""The plan's promises: the gradient stays, more memory never costs speed, advice is true."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.machine.backend import Choice
from lora_grpo.memory.fit import MemoryPlan, describe_memory, plan_memory, verdict
from lora_grpo.memory.shape import PUBLISHED, build_shape
from lora_grpo.memory.terms import GIB

UNSLOTH = Choice("unsloth", "vllm", "", "")
PLAIN = Choice("transformers", "vllm", "", "")
GENERATE = Choice("transformers", "generate", "", "")
SHAPES = {name: build_shape(values, name) for name, values in PUBLISHED.items()}
BUDGETS = st.floats(1, 40).map(lambda size: int(size * GIB))
CONFIGS = st.builds(
    TrainConfig,
    per_device_train_batch_size=st.sampled_from([1, 3, 8, 12, 64]),
    gradient_accumulation_steps=st.sampled_from([8, 16]),
    max_completion_length=st.sampled_from([128, 512, 2048]),
    gradient_checkpointing=st.booleans(),
    shared_prefix=st.booleans(),
    load_in_4bit=st.booleans(),
    vllm_max_num_seqs=st.sampled_from([None, 32]),
)


def plan(
    config: TrainConfig,
    budget: int | None,
    model: str = "Qwen/Qwen2.5-1.5B-Instruct",
    choice: Choice = UNSLOTH,
    device: str = "cuda",
) -> MemoryPlan:
    dtype = "bfloat16" if device == "cuda" else "float32"
    return plan_memory(config, SHAPES[model], choice, device, dtype, budget)


@settings(max_examples=25, deadline=None)
@given(CONFIGS, BUDGETS, st.sampled_from(sorted(SHAPES)), st.sampled_from([UNSLOTH, GENERATE]))
def test_a_plan_keeps_the_batch_and_is_a_valid_configuration(
    config: TrainConfig, budget: int, model: str, choice: Choice
) -> None:
    found = plan(config, budget, model, choice)
    planned = dataclasses.replace(config, **found.settings)
    assert planned.completions_per_step == config.completions_per_step
    assert planned.per_device_train_batch_size <= config.per_device_train_batch_size
    assert found.fits == (found.peak_bytes <= budget)
    assert bool(found.advice) == (not found.fits)


@settings(max_examples=25, deadline=None)
@given(CONFIGS, BUDGETS, BUDGETS, st.sampled_from([UNSLOTH, PLAIN, GENERATE]))
def test_more_memory_never_gives_smaller_settings(
    config: TrainConfig, one: int, other: int, choice: Choice
) -> None:
    less, more = (plan(config, budget, choice=choice) for budget in sorted((one, other)))
    tight = dataclasses.replace(config, **less.settings)
    roomy = dataclasses.replace(config, **more.settings)
    assert roomy.per_device_train_batch_size >= tight.per_device_train_batch_size
    assert roomy.gradient_checkpointing <= tight.gradient_checkpointing
    assert more.fits >= less.fits


@settings(max_examples=6, deadline=None)
@given(CONFIGS, st.floats(1, 6))
def test_what_the_advice_names_does_fit(config: TrainConfig, size: float) -> None:
    budget = int(size * GIB)
    found = plan(config, budget, "Qwen/Qwen2.5-3B-Instruct")
    for sentence in found.advice:
        words = sentence.split()
        if words[0] == "--model":
            assert plan(config, budget, words[1]).fits
        elif words[0] == "--load-in-4bit":
            whole = dataclasses.replace(config, load_in_4bit=True)
            assert plan(whole, budget, "Qwen/Qwen2.5-3B-Instruct").fits
        else:
            needed = int(float(words[words.index("GB") - 1]) * GIB)
            assert plan(config, needed, "Qwen/Qwen2.5-3B-Instruct").fits
            assert not plan(config, needed - GIB // 2, "Qwen/Qwen2.5-3B-Instruct").fits


def test_the_cheapest_change_comes_first_and_says_its_price() -> None:
    config = TrainConfig(shared_prefix=False)
    peak = plan(config, None, choice=GENERATE).peak_bytes
    found = plan(config, peak - 1, choice=GENERATE)
    assert found.settings == {"gradient_checkpointing": True}
    assert "more arithmetic in an update; saves" in found.choices[0]
    tight = plan(config, 7 * GIB, choice=GENERATE)
    assert tight.fits
    assert tight.settings["gradient_checkpointing"]


def test_a_packed_update_is_made_smaller_by_checkpointing_first() -> None:
    config = TrainConfig(max_completion_length=2048)
    peak = plan(config, None, choice=GENERATE).peak_bytes
    found = plan(config, peak - 1, choice=GENERATE)
    assert found.settings == {"gradient_checkpointing": True}
    assert found.choices[0].startswith("gradient checkpointing: the same gradient")
    own = plan(dataclasses.replace(config, shared_prefix=False), None, choice=GENERATE)
    assert peak < own.peak_bytes


def test_a_micro_batch_is_changed_for_its_part_alone() -> None:
    config = TrainConfig(gradient_checkpointing=True)
    config = dataclasses.replace(
        config, per_device_train_batch_size=32, gradient_accumulation_steps=2
    )
    found = plan(config, 5 * GIB, choice=GENERATE)
    sentence = next(text for text in found.choices if text.startswith("micro-batch"))
    micro = found.settings["per_device_train_batch_size"]
    assert sentence.startswith(f"micro-batch 32 -> {micro}, accumulation 2 -> {64 // micro}")


def test_vllm_gets_the_share_that_holds_every_sequence() -> None:
    found = plan(TrainConfig(), 24 * GIB)
    config = dataclasses.replace(TrainConfig(), **found.settings)
    cache = next(
        term
        for phase in found.prediction.phases
        for term in phase.terms
        if term.name == "vLLM's KV cache"
    )
    assert config.vllm_max_num_seqs == 64
    assert cache.bytes >= 64 * 1024 * SHAPES["Qwen/Qwen2.5-1.5B-Instruct"].cache_per_token(2)
    assert cache.bytes < config.vllm_gpu_memory_utilization * 24 * GIB


def test_what_the_user_set_for_vllm_is_kept() -> None:
    config = TrainConfig(vllm_gpu_memory_utilization=0.6, vllm_max_num_seqs=16)
    found = plan(config, 24 * GIB)
    assert not {"vllm_gpu_memory_utilization", "vllm_max_num_seqs"} & found.settings.keys()
    assert found.peak_bytes > 0.6 * 24 * GIB
    tight = plan(dataclasses.replace(config, vllm_gpu_memory_utilization=None), 2 * GIB)
    assert "vllm_max_num_seqs" not in tight.settings


def test_bnpo_cannot_shrink_its_micro_batch_and_says_so() -> None:
    config = TrainConfig(
        loss_type="bnpo", per_device_train_batch_size=64, gradient_accumulation_steps=1
    )
    found = plan(config, 6 * GIB)
    assert "per_device_train_batch_size" not in found.settings
    assert "bnpo allows no smaller micro-batch" in verdict(found)
    assert any("--loss-type dapo fits" in sentence for sentence in found.advice)


def test_unshared_weights_cost_their_own_size() -> None:
    shared, own = (plan(TrainConfig(), 24 * GIB, choice=choice) for choice in (UNSLOTH, PLAIN))
    terms = {term.name: term.bytes for phase in own.prediction.phases for term in phase.terms}
    generation = [found.prediction.phases[0].bytes for found in (shared, own)]
    assert generation[1] - generation[0] == pytest.approx(terms["vLLM's weights"], rel=0.01)


def test_a_cpu_is_planned_too() -> None:
    config = TrainConfig(load_in_4bit=False)
    roomy = plan(config, None, "HuggingFaceTB/SmolLM2-135M-Instruct", GENERATE, "cpu")
    assert not roomy.settings
    budget = roomy.peak_bytes * 3 // 4
    tight = plan(config, budget, "HuggingFaceTB/SmolLM2-135M-Instruct", GENERATE, "cpu")
    assert tight.fits
    assert "vllm_max_num_seqs" not in tight.settings


def test_the_rows_at_the_start_of_training() -> None:
    rows = describe_memory(plan(TrainConfig(), 6 * GIB))
    assert 2 <= len(rows) <= 4
    assert rows[0][0] == "memory"
    assert "fits: peak" in rows[0][1]
