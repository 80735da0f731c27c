"""Sampling with shared prompts draws what transformers' generate draws, in fewer passes."""

from pathlib import Path

import pytest
import torch
from trainers import make_trainer
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, set_seed
from trl import GRPOTrainer

from lora_grpo.policy.sampling import draw, once_each, sample


def prompts_of(trainer: GRPOTrainer, group: int) -> list[list[int]]:
    texts = ["What is 3 + 4?", "What is 12 + 30 - 7 + 5?", "2 + 2?"]
    ids = trainer._tokenizer(texts)["input_ids"]
    return [prompt for prompt in ids for _ in range(group)]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"top_p": 0.8, "temperature": 0.7},
        {"load_in_4bit": True},
        {"gradient_checkpointing": True},
    ],
)
def test_the_same_draws_as_generate(
    tmp_path: Path, knobs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: draw(p)[:, None])
    trainer = make_trainer(tmp_path, **knobs)
    assert trainer.packed
    prompts = prompts_of(trainer, 4)
    set_seed(3)
    found, _ = trainer._generate_single_turn(prompts, None, {}, 4)
    assert trainer.model.training
    set_seed(3)
    expected, _ = GRPOTrainer._generate_single_turn(trainer, prompts, None, {}, 4)
    assert found == expected
    assert len({tuple(row) for row in found}) > 3


def test_logits_of_every_step_equal_a_whole_pass() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[:, -1]))
    prompts = [[5, 6, 7]] * 2 + [[9, 8, 7, 6, 5]] * 2
    settings = GenerationConfig(temperature=1.0, top_p=1.0, top_k=0)
    found = sample(model, prompts, settings, [60], 6)
    steps = [seen[0].repeat_interleave(2, 0), *seen[1:]]
    assert len(seen[0]) == 2, "a prompt went through the model more than once"
    for row, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
        whole = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        for step in range(len(completion)):
            torch.testing.assert_close(
                steps[step][row], whole[len(prompt) - 1 + step], rtol=1e-4, atol=1e-5
            )


def test_prompts_that_stand_unevenly_are_not_shared() -> None:
    assert once_each([[1], [1], [2], [2]]) == [[1], [2]]
    assert once_each([[1], [1], [2]]) == [[1], [1], [2]]


def test_tokens_are_drawn_by_their_probability_and_never_without_one() -> None:
    torch.manual_seed(1)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    rows = 20_000
    found = draw(probabilities.expand(rows, -1)).bincount(minlength=6) / rows
    assert torch.equal(found > 0, probabilities > 0)
    error = (probabilities * (1 - probabilities) / rows).sqrt()
    assert ((found - probabilities).abs() <= 4 * error).all()


def test_probabilities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.tensor([[0.5, float("nan")]]))
