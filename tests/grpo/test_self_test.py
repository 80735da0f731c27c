"""At its start the trainer finds out whether packed rows give what TRL's own update gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import make_trainer
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PretrainedConfig,
    StableLmConfig,
)
from trl import GRPOTrainer
from update_cases import compare

from lora_grpo.grpo import packing, self_test
from lora_grpo.grpo.trainer import LoraGRPOTrainer, check_overrides
from lora_grpo.policy import layers
from lora_grpo.policy.base import EMBEDDED_FOLDER, Placement, load_base
from lora_grpo.policy.sampling import Decoding

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BARE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
QV = ("q_proj", "v_proj")


def loader(config: PretrainedConfig) -> Callable[[], torch.nn.Module]:
    """Return a function that makes a model of random weights, the same every time."""

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    return load


def start(tmp_path: Path, **knobs: Any) -> tuple[LoraGRPOTrainer, str]:
    """Return a trainer and what it said at its start."""
    said: list[str] = []
    trainer = make_trainer(tmp_path, say=said.append, **knobs)
    assert len(said) == (not trainer.packed)
    return trainer, "".join(said)


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (Olmo2Config(**SHAPE), ("q_proj", "up_proj", "down_proj")),
        (GPTNeoXConfig(**BARE), ("query_key_value", "dense_h_to_4h")),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_family_that_nobody_listed_is_packed_and_equals_trl(
    tmp_path: Path, config: PretrainedConfig, targets: tuple[str, ...]
) -> None:
    compare(tmp_path, 6, dead=(1,), load=loader(config), target_modules=targets)


@pytest.mark.parametrize(
    ("config", "targets", "reason"),
    [
        (MistralConfig(**SHAPE, sliding_window=4), QV, "sliding_window 4"),
        (LlamaConfig(**SHAPE, attention_dropout=0.1), QV, "dropout 0.1"),
        (Gemma2Config(**SHAPE, head_dim=8), QV, "sliding_attention"),
        (GraniteConfig(**SHAPE, logits_scaling=2.0), QV, "log-probs differ"),
        (CohereConfig(**SHAPE, logit_scale=0.5), QV, "log-probs differ"),
        (StableLmConfig(**SHAPE), QV, "`groups`"),
        (OPTConfig(**BARE, ffn_dim=48, word_embed_proj_dim=32), QV, "differ"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_packing_does_not_compute_is_left_to_trl(
    tmp_path: Path, config: PretrainedConfig, targets: tuple[str, ...], reason: str
) -> None:
    trainer, said = start(tmp_path, load=loader(config), target_modules=targets)
    assert not trainer.packed and reason in said


def test_attention_without_keyword_arguments_is_left_to_trl_and_trains(tmp_path: Path) -> None:
    def load() -> torch.nn.Module:
        model = loader(LlamaConfig(**SHAPE))()
        for layer in model.model.layers:

            def forgetful(*rest: Any, own: Any = layer.self_attn.forward, **more: Any) -> Any:
                return own(*rest, **{k: v for k, v in more.items() if k != "groups"})

            layer.self_attn.forward = forgetful
        return model

    trainer, said = start(tmp_path, load=load, max_completion_length=4)
    assert not trainer.packed and "`groups`" in said
    trainer.train()
    assert trainer.step.tokens_computed == 0 and trainer.state.global_step == 1


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    own = packing.attend
    monkeypatch.setattr(packing, "attend", lambda g, q, k, v, scale: own(g, q, k, v, 1.2 * scale))


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    own = layers.backward_product

    def wrong(*rest: Any, **more: Any) -> Any:
        by_x, by_a, by_b = own(*rest, **more)
        return by_x, by_a, 1.01 * by_b

    monkeypatch.setattr(layers, "backward_product", wrong)


def wrong_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Decoding.attend
    monkeypatch.setattr(Decoding, "attend", lambda self, *rest: 1.1 * own(self, *rest))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_attention, "log-probs differ"),
        (wrong_gradient, "gradients differ"),
        (wrong_sampling, "sampling differ"),
    ],
)
def test_a_wrong_packed_path_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable, reason: str
) -> None:
    spoil(monkeypatch)
    trainer, said = start(tmp_path)
    assert not trainer.packed and reason in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_packed_and_a_wrong_attention_is_still_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    knobs = {"load": lambda: load_base(EMBEDDED_FOLDER, Placement("cpu", dtype), False)}
    trainer, _ = start(tmp_path, **knobs)
    assert trainer.packed
    own = packing.attend
    monkeypatch.setattr(packing, "attend", lambda g, q, k, v, s: own(g, q, k, -v, s))
    trainer, said = start(tmp_path, **knobs)
    assert not trainer.packed and "log-probs differ" in said


def test_the_self_test_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {"max_steps": 2, "max_completion_length": 12, "lora_dropout": 0.1}
    found = []
    for tested in (True, False):
        if not tested:
            monkeypatch.setattr("lora_grpo.grpo.trainer.why_not_packed", lambda trainer: None)
        torch.manual_seed(5)
        trainer = make_trainer(tmp_path, **knobs)
        state = {
            "random numbers": torch.get_rng_state(),
            "modes": torch.tensor([module.training for module in trainer.model.modules()]),
            **{name: value.clone() for name, value in trainer.model.state_dict().items()},
        }
        assert trainer.packed and trainer.step.batch.tokens == [] and trainer.step.inputs is None
        assert all(parameter.grad is None for parameter in trainer.trained)
        assert not any(trainer._metrics["train"].values()) and trainer._step == 0
        trainer.train()
        state["trained"] = torch.cat([parameter.flatten() for parameter in trainer.trained])
        found.append(state)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_running_out_of_memory_is_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(self_test, "sampled_and_whole", full)
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(tmp_path)


def test_a_trl_without_an_overridden_method_is_refused() -> None:
    check_overrides(GRPOTrainer)
    with pytest.raises(RuntimeError, match=r"_calculate_rewards.*trl=="):
        check_overrides(type("Later", (), {"_generate": None}))
