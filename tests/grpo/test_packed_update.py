"""The update without repeated work equals plain TRL's: log-probs, loss and every gradient."""

from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)
from trl import GRPOTrainer
from update_cases import PROMPTS, G, compare, crafted_batch, prepare, update, worst_difference

from lora_grpo.config.train_config import LINEAR_LAYERS
from lora_grpo.grpo.logprobs import TiledLogProbs
from lora_grpo.grpo.packing import attention_in_groups, pack
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.policy.layers import fused

LOSSES = ("dapo", "grpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
DEAD, TRUNCATED = (1,), (2, 9)


@pytest.mark.parametrize(("loss_type", "micro_batch"), [*product(LOSSES, (1, 2, 12)), ("bnpo", 12)])
def test_every_loss_in_every_micro_batch(tmp_path: Path, loss_type: str, micro_batch: int) -> None:
    compare(tmp_path, micro_batch, loss_type=loss_type, dead=DEAD, truncated=TRUNCATED)


@pytest.mark.parametrize("loss_type", [*LOSSES, "bnpo"])
@pytest.mark.parametrize(("old", "beta"), [(True, 0.0), (False, 0.1), (True, 0.1)])
def test_later_iterations_and_the_kl_term(
    tmp_path: Path, loss_type: str, old: bool, beta: float
) -> None:
    compare(tmp_path, 12, loss_type=loss_type, dead=DEAD, truncated=(2,), old=old, beta=beta)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_ratio_of_a_whole_completion(tmp_path: Path, loss_type: str, beta: float) -> None:
    bounds = {} if loss_type in ("cispo", "sapo") else {"epsilon": 0.1, "epsilon_high": 0.1}
    compare(
        tmp_path,
        6,
        loss_type=loss_type,
        importance_sampling_level="sequence",
        dead=DEAD,
        truncated=TRUNCATED,
        old=True,
        beta=beta,
        **bounds,
    )


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("grpo", 0.1), ("cispo", 0.0)])
def test_the_entropy_bonus(tmp_path: Path, loss_type: str, beta: float) -> None:
    """Groups without an advantage have a gradient of their own then, truncated rows have none."""
    case = {"loss_type": loss_type, "beta": beta, "dead": DEAD, "truncated": TRUNCATED}
    compare(tmp_path, 12, entropy_coef=0.1, **case)
    with_bonus, without = (
        update(tmp_path, LoraGRPOTrainer, 12, entropy_coef=weight, **case)[1] for weight in (0.1, 0)
    )
    assert worst_difference(with_bonus, without) > 1e-2


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_entropy_bonus_is_the_mean_over_the_step_in_any_micro_batch(
    tmp_path: Path, shared_prefix: bool
) -> None:
    case = {"entropy_coef": 0.1, "dead": DEAD, "truncated": TRUNCATED}
    _, whole, trainer = update(tmp_path, LoraGRPOTrainer, 12, **case)
    for size in (1, 4):
        _, found, parted = update(
            tmp_path, LoraGRPOTrainer, size, shared_prefix=shared_prefix, **case
        )
        assert parted.packed == shared_prefix and worst_difference(found, whole) < 1e-4
        logged = parted._metrics["train"]["entropy"]
        assert sum(logged) / len(logged) == pytest.approx(*trainer._metrics["train"]["entropy"])


def test_the_level_of_the_ratio_changes_the_gradient(tmp_path: Path) -> None:
    found = [
        update(tmp_path, LoraGRPOTrainer, 12, old=True, loss_type="grpo", **level)[1]
        for level in ({}, {"importance_sampling_level": "sequence"})
    ]
    assert worst_difference(*found) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_attention_and_checkpointing(
    tmp_path: Path, attention: str, gradient_checkpointing: bool
) -> None:
    compare(
        tmp_path,
        6,
        gradient_checkpointing=gradient_checkpointing,
        dead=DEAD,
        change=lambda trainer: trainer.model.set_attn_implementation(attention),
    )


def fix_dropout(trainer: GRPOTrainer) -> None:
    """Let every dropout keep the same half of its features, whatever the token."""
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            module.forward = lambda x: x * (torch.arange(x.shape[-1]) % 2) * 2


def test_dropout_with_a_fixed_mask(tmp_path: Path) -> None:
    compare(tmp_path, 6, lora_dropout=0.5, change=fix_dropout)


def test_four_bit_weights(tmp_path: Path) -> None:
    compare(tmp_path, 6, load_in_4bit=True)


@pytest.mark.parametrize("dead", [(), DEAD, (0, 1, 2)])
def test_dead_groups_are_not_computed_and_have_zero_gradients(
    tmp_path: Path, dead: tuple[int, ...]
) -> None:
    _, gradients, trainer = update(tmp_path, LoraGRPOTrainer, 4, dead=dead)
    live = [group for group in range(len(PROMPTS)) if group not in dead]
    lengths = (18 - G, 24 - G, 21 - G)
    assert trainer.step.tokens_computed == sum(PROMPTS[g] + lengths[g] for g in live)
    assert len(gradients) == len(trainer.trained)
    if not live:
        assert all(not gradient.any() for gradient in gradients.values())


def test_logprobs_and_entropies(tmp_path: Path) -> None:
    trainer, _ = prepare(tmp_path, LoraGRPOTrainer, 12, 0.0)
    batch = crafted_batch(trainer, (), TRUNCATED, old=False, beta=0.0)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    ask = (trainer.model, ids, mask, length)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(*ask, 4, compute_entropy=True)
        expected = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, *ask, compute_entropy=True
        )
    counted = batch["completion_mask"].bool()
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine[counted], theirs[counted], rtol=1e-4, atol=1e-5)
        assert not mine[~counted].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_logprobs_and_entropies_are_autograds(dtype: torch.dtype) -> None:
    """With more than one tile of the vocabulary, and logits of 0 and of 80."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=draw).to(dtype) for size in (5, 9000))
    hidden *= torch.tensor([0, 0.1, 1, 2, 5])[:, None]
    targets, temperature = torch.tensor([0, 8999, 4096, 4095, 17]), 0.7
    mixed = torch.randn(2, 5, generator=draw)
    found = TiledLogProbs.apply(hidden.requires_grad_(), weight, targets, temperature, True)
    (gradient,) = torch.autograd.grad((torch.stack(found) * mixed).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    logps = (exact @ weight.double().T / temperature).log_softmax(-1)
    wanted = logps[range(5), targets], -(logps.exp() * logps).sum(-1)
    (expected,) = torch.autograd.grad((torch.stack(wanted) * mixed).sum(), exact)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (gradient - expected).norm(dim=1) / expected.norm(dim=1) == pytest.approx(
        torch.zeros(5), abs=tolerance
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE), Qwen3Config(**SHAPE, head_dim=8)],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(LINEAR_LAYERS)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data.normal_()
    ids = torch.randint(3, 97, (4, 9))
    ids[1:3, :5] = ids[0, :5]
    mask = torch.ones_like(ids)
    mask[:3, :2], mask[1, 7:] = 0, 0
    whole = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    expected = whole[:, 4:-1].gather(2, ids[:, 5:, None])[..., 0]
    packed = pack(ids, mask, 4, [0, 1, 2, 3])
    assert len(packed.groups) == 2 and packed.input_ids.numel() == 3 + 5 + 3 + 1 + 3 + 3
    expected = expected[packed.rows, packed.columns]
    weights = torch.randn(len(expected))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slow = torch.autograd.grad((expected * weights).sum(), trained)
    inner = model.get_base_model()
    with attention_in_groups(inner), fused(inner):
        hidden = inner.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, groups=packed.groups
        ).last_hidden_state[0, packed.predictors]
        head = model.get_output_embeddings().weight
        found, _ = TiledLogProbs.apply(hidden, head, packed.targets, 1.0)
        fast = torch.autograd.grad((found * weights).sum(), trained)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(slow) == 2 * 7 * SHAPE["num_hidden_layers"]
    for mine, theirs in zip(fast, slow, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()
    assert config._attn_implementation == "sdpa"


def test_a_mixture_of_experts_is_updated_as_trl_does(tmp_path: Path) -> None:
    """Its loss has a term of the routers, which packed rows do not give."""
    config = Qwen2MoeConfig(
        **SHAPE | {"vocab_size": 512},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    knobs = {"target_modules": ("q_proj", "v_proj"), "load": load}
    said: list[str] = []
    loss, gradients, trainer = update(tmp_path, LoraGRPOTrainer, 6, say=said.append, **knobs)
    assert not trainer.packed and len(said) == 1 and "experts" in said[0]
    expected_loss, expected, plain = update(tmp_path, GRPOTrainer, 6, **knobs)
    assert plain.router_aux_loss_coef > 0 and len(plain._metrics["train"]["aux_loss"]) == 2
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert worst_difference(gradients, expected) < 1e-6


def test_what_differs_is_seen(tmp_path: Path) -> None:
    """The comparison itself would notice a wrong gradient."""
    _, right, _ = update(tmp_path, GRPOTrainer, 6)
    _, other, _ = update(tmp_path, LoraGRPOTrainer, 6, dead=DEAD)
    assert worst_difference(other, right) > 1e-2
