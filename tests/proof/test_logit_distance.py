"""The distance of two models is what its words say, and no padding gets into it."""

import math

import pytest
import torch

from lora_grpo.dev.tiny_model import PretrainConfig, build_model, train_tokenizer
from lora_grpo.proof.distance import collect_logits, continue_greedily, measure_distance

torch.set_num_threads(1)


def test_measures_of_a_worked_example():
    reference = [torch.tensor([[math.log(3.0), 0.0], [0.0, 1.0]])]
    other = [torch.tensor([[0.0, math.log(3.0)], [0.0, 1.0]])]
    found = measure_distance(reference, other)
    assert found.positions == 2
    assert found.greedy_agreement == 0.5
    assert found.max_logit_difference == pytest.approx(math.log(3))
    # At the first position p = (3/4, 1/4) and q = (1/4, 3/4), so KL = 1/2 ln 3.
    assert found.mean_kl == pytest.approx(math.log(3) / 4)
    assert found.largest_flipped_margin == pytest.approx(math.log(3))


def test_nothing_is_apart_from_itself():
    logits = [torch.randn(4, 9), torch.randn(2, 9)]
    found = measure_distance(logits, logits)
    assert (found.max_logit_difference, found.mean_kl, found.greedy_agreement) == (0, 0, 1)
    assert found.largest_flipped_margin == 0


def test_a_logit_that_is_no_number_meets_no_bound():
    found = measure_distance([torch.zeros(1, 3)], [torch.tensor([[0.0, math.nan, 0.0]])])
    assert not found.max_logit_difference <= math.inf
    assert not found.mean_kl <= math.inf


def test_a_prompt_gets_the_same_probe_alone_and_in_a_batch():
    tokenizer = train_tokenizer(0)
    config = PretrainConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    model = build_model(config, tokenizer).eval()
    prompts = ["7", "Tom has 12 apples and buys 30 more.", "How many?"]
    together = continue_greedily(model, tokenizer, prompts, 8)
    alone = [continue_greedily(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert together == alone
    assert all(len(logits) <= 5 for logits in collect_logits(model, together, kept=5))
