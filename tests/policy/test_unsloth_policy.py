"""The base answers alone, then the adapter as it is at each moment, by vLLM and without it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from unsloth_stand_in import CONFIG, folder_with_ends, stand_in

from lora_grpo.data.problems import load_problems
from lora_grpo.data.prompt import build_messages, render
from lora_grpo.policy.base import load_tokenizer
from lora_grpo.policy.generate import Completion, complete
from lora_grpo.policy.unsloth import UnslothPolicy, open_unsloth

LENGTH = 12


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list:
    return stand_in(monkeypatch)


@pytest.fixture
def prompts(tiny_model_folder: Path) -> list[str]:
    tokenizer = load_tokenizer(tiny_model_folder)
    problems = load_problems("arithmetic", "test", None, None)[:6]
    return [render(tokenizer, build_messages(problem.question)) for problem in problems]


def opened(folder: Path, rollout: str):
    config = dataclasses.replace(CONFIG, rollout=rollout, lora_dropout=0.0)
    return open_unsloth(config, folder, load_tokenizer(folder))


def learn(policy: UnslothPolicy) -> None:
    """Give the adapter a say."""
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)


def plainly(policy: UnslothPolicy, prompts: list[str]) -> list[Completion]:
    return complete(policy.model, policy.tokenizer, prompts, LENGTH, 3)


@pytest.mark.usefixtures("deleted")
def test_vllm_gets_token_ids_and_no_adapter_for_the_base(
    tiny_model_folder: Path, prompts: list[str], tmp_path: Path
) -> None:
    told: list[int] = []
    folder = folder_with_ends(tiny_model_folder, tmp_path / "model", [5, 2])
    with opened(folder, "vllm") as policy:
        found = policy.complete(prompts, LENGTH, told.append)
        engine = policy.model.vllm_engine
        assert found == plainly(policy, prompts)
        assert len({answer.text for answer in found}) > 1
        assert engine.requests == [None, None] and told == [4, 2] and engine.stops == {2, 5}
        assert engine.calls == ["generate", "generate", "sleep 1"]


@pytest.mark.usefixtures("deleted")
def test_vllm_gets_the_adapter_as_it_is_once_there_is_a_trainer(
    tiny_model_folder: Path, prompts: list[str]
) -> None:
    with opened(tiny_model_folder, "vllm") as policy:
        policy.follow(policy.model)
        policy.complete(prompts, LENGTH)
        requests = policy.model.vllm_engine.requests
        assert all(request.load_tensors for request in requests)
        policy.abort()
        assert policy.model.vllm_engine.calls[-1] == "abort ['7'] True"


@pytest.mark.usefixtures("deleted")
def test_the_engine_sleeps_after_an_error_too(tiny_model_folder: Path) -> None:
    def no_memory(count: int) -> None:
        raise torch.OutOfMemoryError

    with opened(tiny_model_folder, "vllm") as policy:
        with pytest.raises(torch.OutOfMemoryError):
            policy.complete(["1 + 1"], LENGTH, no_memory)
        assert policy.model.vllm_engine.calls[-1] == "sleep 1"


@pytest.mark.usefixtures("deleted")
def test_without_vllm_the_base_answers_alone_until_the_trainer_is_followed(
    tiny_model_folder: Path, prompts: list[str]
) -> None:
    with opened(tiny_model_folder, "generate") as policy:
        base = plainly(policy, prompts)
        learn(policy)
        assert policy.complete(prompts, LENGTH) == base
        policy.follow(policy.model)
        assert policy.complete(prompts, LENGTH) == plainly(policy, prompts) != base


@pytest.mark.usefixtures("deleted")
def test_a_training_model_goes_back_to_training_in_unsloths_way(
    tiny_model_folder: Path, prompts: list[str]
) -> None:
    with opened(tiny_model_folder, "generate") as policy:
        policy.model.eval()
        policy.complete(prompts[:1], LENGTH)
        assert policy.model.modes == ["inference"]
        policy.model.train()
        policy.complete(prompts[:1], LENGTH)
        assert policy.model.modes == ["inference", "inference", "training"]
        trained = [p for n, p in policy.model.named_parameters() if "lora_" in n]
        assert trained and all(parameter.requires_grad for parameter in trained)


def test_vllm_is_ended_however_the_block_ends(tiny_model_folder: Path, deleted: list) -> None:
    with pytest.raises(KeyError), opened(tiny_model_folder, "vllm") as policy:
        engine = policy.model.vllm_engine
        raise KeyError
    assert deleted == [engine]
    assert not hasattr(policy.model, "vllm_engine"), "nothing holds the engine"
    policy.close()
    assert deleted == [engine]
