"""The plan's promises: the gradient stays, more memory never costs speed, advice is true."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.memory.fit import MemoryPlan, describe_memory, plan_memory, verdict
from lora_grpo.memory.shape import PUBLISHED, build_shape
from lora_grpo.memory.terms import GIB, Job

UNSLOTH, PLAIN = ("unsloth", "vllm"), ("transformers", "vllm")
GENERATE = ("transformers", "generate")
SHAPES = {name: build_shape(values, name) for name, values in PUBLISHED.items()}
LARGEST = "Qwen/Qwen2.5-3B-Instruct"
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
    budget: int = 1000 * GIB,
    model: str = "Qwen/Qwen2.5-1.5B-Instruct",
    engines: tuple[str, str] = UNSLOTH,
    device: str = "cuda",
) -> MemoryPlan:
    dtype = "bfloat16" if device == "cuda" else "float32"
    length = config.max_prompt_length
    return plan_memory(Job(SHAPES[model], config, *engines, device, dtype, length, budget), budget)


@settings(max_examples=25, deadline=None)
@given(CONFIGS, BUDGETS, st.sampled_from(sorted(SHAPES)), st.sampled_from([UNSLOTH, GENERATE]))
def test_a_plan_keeps_the_batch_and_is_a_valid_configuration(
    config: TrainConfig, budget: int, model: str, engines: tuple[str, str]
) -> None:
    found = plan(config, budget, model, engines)
    planned = replace(config, **found.settings)
    assert planned.completions_per_step == config.completions_per_step
    assert planned.per_device_train_batch_size <= config.per_device_train_batch_size
    assert found.fits == (found.peak_bytes <= budget)
    assert bool(found.advice) == (not found.fits)


@settings(max_examples=25, deadline=None)
@given(CONFIGS, BUDGETS, BUDGETS, st.sampled_from([UNSLOTH, PLAIN, GENERATE]))
def test_more_memory_never_gives_smaller_settings(
    config: TrainConfig, one: int, other: int, engines: tuple[str, str]
) -> None:
    less, more = (plan(config, budget, engines=engines) for budget in sorted((one, other)))
    tight, roomy = (replace(config, **found.settings) for found in (less, more))
    assert roomy.per_device_train_batch_size >= tight.per_device_train_batch_size
    assert roomy.gradient_checkpointing <= tight.gradient_checkpointing
    assert more.fits >= less.fits


@settings(max_examples=10, deadline=None)
@given(CONFIGS, st.floats(1, 6))
def test_what_the_advice_names_does_fit(config: TrainConfig, size: float) -> None:
    budget = int(size * GIB)
    for sentence in plan(config, budget, LARGEST).advice:
        words = sentence.split()
        if words[0] == "--model":
            assert plan(config, budget, words[1]).fits
        elif words[0] == "--load-in-4bit":
            assert plan(replace(config, load_in_4bit=True), budget, LARGEST).fits
        else:
            needed = float(words[words.index("GB") - 1]) * GIB
            assert plan(config, int(needed), LARGEST).fits
            assert not plan(config, int(0.75 * needed), LARGEST).fits


def test_the_cheapest_change_comes_first_and_says_its_price() -> None:
    config = TrainConfig(max_completion_length=2048)
    peak = plan(config, engines=GENERATE).peak_bytes
    found = plan(config, peak - 1, engines=GENERATE)
    assert found.settings == {"gradient_checkpointing": True}
    assert found.choices[0].startswith("--gradient-checkpointing False -> True: the same gradient")
    own = plan(replace(config, shared_prefix=False), engines=GENERATE)
    assert peak < own.peak_bytes


def test_vllm_gets_the_share_that_holds_every_sequence() -> None:
    found = plan(TrainConfig(), 24 * GIB)
    generation = found.prediction.phases[0]
    cache = next(term.bytes for term in generation.terms if term.name == "vLLM's KV cache")
    assert found.settings["vllm_max_num_seqs"] == 64
    assert cache >= 64 * 1024 * SHAPES["Qwen/Qwen2.5-1.5B-Instruct"].cache_per_token(2)
    assert cache < found.settings["vllm_gpu_memory_utilization"] * 24 * GIB


def test_what_the_user_set_for_vllm_is_kept() -> None:
    config = TrainConfig(vllm_gpu_memory_utilization=0.6, vllm_max_num_seqs=16)
    found = plan(config, 24 * GIB)
    assert not {"vllm_gpu_memory_utilization", "vllm_max_num_seqs"} & found.settings.keys()
    assert found.peak_bytes > 0.6 * 24 * GIB
    tight = plan(replace(config, vllm_gpu_memory_utilization=None), 2 * GIB)
    assert "vllm_max_num_seqs" not in tight.settings


def test_bnpo_cannot_shrink_its_micro_batch_and_says_so() -> None:
    sizes = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    found = plan(TrainConfig(loss_type="bnpo", **sizes), 6 * GIB)
    assert "per_device_train_batch_size" not in found.settings
    assert "bnpo allows no smaller micro-batch" in verdict(found)
    assert "--loss-type dapo fits" in found.advice


def test_a_cpu_is_planned_too() -> None:
    on_cpu = ("HuggingFaceTB/SmolLM2-135M-Instruct", GENERATE, "cpu")
    config = TrainConfig(load_in_4bit=False)
    roomy = plan(config, 1000 * GIB, *on_cpu)
    assert not roomy.settings
    tight = plan(config, roomy.peak_bytes * 3 // 4, *on_cpu)
    assert tight.fits and tight.settings
    rows = describe_memory(tight)
    assert 2 <= len(rows) <= 4 and "fits: peak" in rows[0][1]
