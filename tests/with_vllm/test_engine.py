"""The engine answers as PEFT's policy does, follows it, and never touches the base's weights."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback
from trl import GRPOTrainer

from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import LINEAR_LAYERS, TrainConfig
from lora_grpo.data.problems import load_problems
from lora_grpo.data.prompt import PLAIN, build_messages, render
from lora_grpo.grpo.settings import build_dataset, grpo_config, lora_config
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.grpo.vllm_rollout import sample_with_vllm
from lora_grpo.policy.base import EMBEDDED_FOLDER, Placement, load_base, load_tokenizer
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.generate import complete
from lora_grpo.policy.vllm import PREFIX, Engine, EngineSettings, open_engine
from lora_grpo.rewards.builtin import build_rewards

CPU = Placement("cpu", "float32")
TOLERANCE = 1e-4  # nats, in float32
SETTINGS = EngineSettings(CPU, 224, 32, 16, load_in_4bit=True)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 40}


@pytest.fixture(scope="module")
def base():
    return load_base(EMBEDDED_FOLDER, CPU, load_in_4bit=True, double_quant=False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_FOLDER)


@pytest.fixture(scope="module")
def engine(base) -> Iterator[Engine]:
    with open_engine(EMBEDDED_FOLDER, SETTINGS, [2], base) as opened:
        yield opened


def adapt(base, seed: int = 0, **settings) -> PeftModel:
    """Put an adapter on a base that already changes what it says."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM", **settings
    )
    model = get_peft_model(base, config)
    stir(model)
    return model


def stir(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def ask(tokenizer, count: int) -> tuple[list[str], list[list[int]]]:
    problems = load_problems("arithmetic", "test")[:count]
    prompts = [render(tokenizer, build_messages(problem.question)) for problem in problems]
    return prompts, tokenizer(prompts, add_special_tokens=False)["input_ids"]


def score(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The log-probs of a completion's tokens, by a plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[torch.arange(len(completion)), torch.tensor(completion)]


def distance(model, prompts, completions, logprobs) -> float:
    """The largest difference of the engine's log-probs from those of the model."""
    return max(
        (score(model, prompt, ids) - torch.tensor(found)).abs().max().item()
        for prompt, ids, found in zip(prompts, completions, logprobs, strict=True)
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_logprobs_are_those_of_peft(base, engine, tokenizer, use_rslora: bool) -> None:
    _, prompts = ask(tokenizer, 16)
    model = adapt(base, use_rslora=use_rslora)
    try:
        engine.sync(model)
        completions, logprobs = engine.sample(prompts, seed=1, **SAMPLING)
        worst = distance(model, prompts, completions, logprobs)
        print(f"\nlargest difference of log-probs, rslora {use_rslora}: {worst:.1e} nats")
        assert worst < TOLERANCE
        with model.disable_adapter():
            assert distance(model, prompts, completions, logprobs) > 100 * TOLERANCE
    finally:
        model.unload()


def test_a_draw_depends_on_its_seed_alone(base, engine, tokenizer) -> None:
    _, prompts = ask(tokenizer, 16)
    model = adapt(base)
    engine.sync(model)
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = engine.sample(prompts, seed=1, **SAMPLING)
    assert torch.equal(torch.rand(1), expected_next)
    engine.sync(model)
    assert engine.sample(prompts, seed=1, **SAMPLING) == first
    assert engine.sample(prompts, seed=2, **SAMPLING)[0] != first[0]
    model.unload()


def hash_engine(engine: Engine) -> str:
    def digest(model: torch.nn.Module) -> str:
        found = hashlib.sha256()
        for name, parameter in model.named_parameters():
            found.update(name.encode())
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    return engine.llm.apply_model(digest)[0]


def hash_base(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            found.update(name.encode())
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_ten_syncs_leave_every_base_weight_as_it_was(base, engine, tokenizer) -> None:
    _, prompts = ask(tokenizer, 4)
    model = adapt(base)
    before = hash_engine(engine), hash_base(model)
    seen = set()
    for _ in range(10):
        stir(model)
        engine.sync(model)
        seen.add(str(engine.sample(prompts, seed=1, **SAMPLING)[1]))
    assert len(seen) == 10, "each sync changes what the engine says"
    assert (hash_engine(engine), hash_base(model)) == before
    model.unload()


def test_merging_and_unmerging_does_not_leave_nf4_as_it_was(base) -> None:
    """What TRL's own sync does; the reason for sending the adapter alone."""
    model = adapt(load_base(EMBEDDED_FOLDER, CPU, load_in_4bit=True, double_quant=False))
    before = hash_base(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert hash_base(model) != before


def test_greedy_answers_are_those_of_generate(base, engine, tokenizer, monkeypatch) -> None:
    prompts, _ = ask(tokenizer, 64)
    monkeypatch.setattr(engine, "request", None)
    assert engine.complete(tokenizer, prompts, 40) == complete(base, tokenizer, prompts, 40, 32)
    model = adapt(base)
    engine.sync(model)
    heard: list[int] = []
    answers = engine.complete(tokenizer, prompts, 40, heard.append)
    assert answers == complete(model, tokenizer, prompts, 40, 32)
    assert sum(heard) == 64
    model.unload()


def test_samples_depend_on_the_seed_and_their_place_alone(engine, tokenizer, monkeypatch) -> None:
    prompts, _ = ask(tokenizer, 8)
    monkeypatch.setattr(engine, "request", None)
    heard: list[int] = []
    sampling = Sampling(4, 1.0, 0)
    drawn = engine.complete(tokenizer, prompts, 40, heard.append, sampling)
    assert len(drawn) == sum(heard) == 32
    assert len({done.text for done in drawn}) > 16
    less = engine.complete(tokenizer, prompts[:3], 40, sampling=Sampling(2, 1.0, 0))
    assert less == [drawn[4 * prompt + sample] for prompt in range(3) for sample in range(2)]
    assert engine.complete(tokenizer, prompts[:3], 40, sampling=Sampling(4, 1.0, 1)) != drawn[:12]
    greedy = engine.complete(tokenizer, prompts, 40)
    cold = engine.complete(tokenizer, prompts, 40, sampling=Sampling(2, 1e-4, 0))
    assert cold == [done for done in greedy for _ in range(2)]


def make_trainer(tmp_path: Path, **knobs) -> LoraGRPOTrainer:
    small = {"max_steps": 3, "num_generations": 4, "per_device_train_batch_size": 16}
    config = TrainConfig(**{**PRESETS["tiny"], **small, **knobs})
    rewards = build_rewards("default", max_completion_length=config.max_completion_length)
    trainer = LoraGRPOTrainer(
        load_base(EMBEDDED_FOLDER, CPU, load_in_4bit=True, double_quant=False),
        load_tokenizer(EMBEDDED_FOLDER),
        rewards,
        grpo_config(config, tmp_path, CPU, config.max_steps, 0, rewards),
        lora_config(config),
        build_dataset(config, load_problems("arithmetic")[:64], PLAIN, config.max_steps),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_after_a_step_and_a_sync_the_engine_has_moved_with_the_policy(
    tmp_path: Path, engine, tokenizer
) -> None:
    _, prompts = ask(tokenizer, 8)
    trainer = make_trainer(tmp_path)
    sample_with_vllm(trainer, engine)
    engine.sync(trainer.model)
    completions, before = engine.sample(prompts, seed=1, **SAMPLING)
    trainer.train()
    assert distance(trainer.model, prompts, *engine.sample(prompts, seed=1, **SAMPLING)) > 0.01
    engine.sync(trainer.model)
    moved = distance(trainer.model, prompts, completions, before)
    after, logprobs = engine.sample(prompts, seed=1, **SAMPLING)
    worst = distance(trainer.model, prompts, after, logprobs)
    print(
        f"\nafter three steps the policy moved by {moved:.2f} nats; the engine is {worst:.1e} off"
    )
    assert moved > 0.01 and worst < TOLERANCE
    for logs in trainer.state.log_history[:3]:
        assert logs["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert logs["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token_truncate", lambda tokens: (3.0 + tokens - 1) / tokens),
        ("token_mask", lambda tokens: (tokens - 1) / tokens),
        ("sequence_mask", lambda tokens: 0.0),
    ],
)
def test_the_engines_logprobs_reach_the_importance_weights(
    tmp_path: Path, engine, mode: str, weights: Callable[[float], float]
) -> None:
    """The first token of each completion comes two nats too unlikely: a ratio of 7.4, over 3."""
    trainer = make_trainer(tmp_path, max_steps=1, vllm_importance_sampling_mode=mode)
    sample_with_vllm(trainer, engine)
    plain = engine.sample

    def doubtful(*arguments, **settings):
        ids, logprobs = plain(*arguments, **settings)
        return ids, [[row[0] - 2.0, *row[1:]] for row in logprobs]

    trainer.vllm_generation.engine = type("Doubtful", (), {"sample": staticmethod(doubtful)})()
    trainer.vllm_generation.engine.sync = engine.sync
    trainer.train()
    logs = trainer.state.log_history[0]
    tokens = sum(trainer.step.batch.tokens) / len(trainer.step.batch.tokens)
    found = logs["sampling/importance_sampling_ratio/mean"]
    assert found == pytest.approx(weights(tokens), rel=1e-3)
    clipped = 1.0 if mode == "sequence_mask" else 1 / tokens
    assert logs["sampling/importance_sampling_ratio/clipped"] == pytest.approx(clipped, rel=1e-3)


def test_an_engine_that_runs_out_of_memory_samples_fewer_at_once(
    tmp_path: Path, engine, monkeypatch
) -> None:
    runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
    plain, raised = type(runner).execute_model, []

    def execute(self, scheduled, *rest, **more):
        if len(scheduled.num_scheduled_tokens) > 4:
            raised.append(len(scheduled.num_scheduled_tokens))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return plain(self, scheduled, *rest, **more)

    trainer = make_trainer(tmp_path, max_steps=2)
    said: list[str] = []
    trainer.generation_rows.say = said.append
    sample_with_vllm(trainer, engine)
    monkeypatch.setattr(type(runner), "execute_model", execute)
    trainer.train()
    assert len(raised) == 2 and len(said) == 2
    assert len(trainer.step.batch.completions) == 16
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_nothing_is_left_when_the_block_fails(base, tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import *
import torch
from test_engine import *
base = load_base(EMBEDDED_FOLDER, CPU, load_in_4bit=True, double_quant=False)
try:
    with open_engine(EMBEDDED_FOLDER, SETTINGS, [2], base) as opened:
        assert torch.distributed.is_initialized()
        assert list(Path({str(tmp_path)!r}).glob(PREFIX + "*"))
        raise KeyboardInterrupt
except KeyboardInterrupt:
    assert not torch.distributed.is_initialized()
    assert opened.llm is None
    opened.close()
    print("closed")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("closed\n"), done.stderr
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_trl_calls_nothing_else_of_its_sampler() -> None:
    source = Path(sys.modules[GRPOTrainer.__module__].__file__).read_text()
    lines = [line for line in source.splitlines() if "self.vllm_generation." in line]
    called = {line.split("self.vllm_generation.")[1].split("(")[0] for line in lines}
    only_with_tools = "llm.llm_engine.model_config.max_model_len"
    assert called == {"sync_weights", "generate", only_with_tools}
