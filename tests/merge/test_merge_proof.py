"""The proof of a merge fails on damage, by the name of what is damaged, and leaves nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merge_models import (
    LINEAR,
    Q_PROJ,
    change_json,
    change_tensor,
    load_all,
    make_adapter,
    make_base,
    make_tokenizer,
    merge_only,
    save_adapter,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.data.prompt import build_messages, render
from lora_grpo.merge import prove as merge_proof
from lora_grpo.merge.command import MergeConfig, MergeProofError, merge_adapter
from lora_grpo.merge.write import write_weights
from lora_grpo.proof.checks import check_distance
from lora_grpo.proof.distance import Distance, continue_greedily


def scale_deltas(folder: Path, plan, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    base = load_all(plan.base_folder)
    for name, delta in plan.deltas.items():
        tensors[name] = (base[name].float() + factor * delta.compute()).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def untie(folder: Path, plan) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", tie_word_embeddings=False)


def swap_two_tokens(folder: Path, plan) -> None:
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    vocab = said["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(said))


DAMAGES = {
    "a delta is missing": (
        lambda f, p: change_tensor(f, Q_PROJ, lambda t: load_all(p.base_folder)[Q_PROJ]),
        {"tensors", "logits"},
    ),
    "no delta was added": (
        lambda f, p: scale_deltas(f, p, 0.0),
        {"tensors", "logits", "kl", "greedy"},
    ),
    "the scaling is 1.5 times too large": (
        lambda f, p: scale_deltas(f, p, 1.5),
        {"tensors", "logits", "kl"},
    ),
    "an adapted tensor is 1 % too large": (
        lambda f, p: change_tensor(f, Q_PROJ, lambda t: t * 1.01),
        {"tensors"},
    ),
    "a norm is 1 % too large": (
        lambda f, p: change_tensor(f, "model.norm.weight", lambda t: t * 1.01),
        {"tensors"},
    ),
    "one value is an ulp off": (
        lambda f, p: change_tensor(f, Q_PROJ, lambda t: nudge(t)),
        {"tensors"},
    ),
    "the EOS is another": (
        lambda f, p: change_json(f / "generation_config.json", eos_token_id=[0]),
        {"eos"},
    ),
    "the embeddings are untied": (untie, {"tied_embeddings", "tensors", "config"}),
    "the tokenizer gives other ids": (swap_two_tokens, {"tokenizer"}),
    "the chat template is another": (
        lambda f, p: (f / "chat_template.jinja").write_text("{{ messages }}"),
        {"tokenizer"},
    ),
    "the config speaks of quantisation": (
        lambda f, p: change_json(f / "config.json", quantization_config={"load_in_4bit": True}),
        {"config", "reload"},
    ),
    "a flag would not be saved again": (
        lambda f, p: change_json(f / "generation_config.json", temperature=0.5, do_sample=False),
        {"generation_config"},
    ),
}


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(9.0).bfloat16())
    return changed


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Return the plan and the folder of an honest merge, of a strong adapter."""
    folder = tmp_path_factory.mktemp("honest")
    adapter = save_adapter(folder / "run", make_base(), std=0.1)
    return merge_only(adapter, folder / "merged"), folder / "merged"


SEEN_BY_LOADING = {"logits", "kl", "greedy", "reload"}
KINDS = [(damage, "tensors") for damage in DAMAGES] + [
    (damage, "logits") for damage, (_, expected) in DAMAGES.items() if expected & SEEN_BY_LOADING
]


@pytest.mark.parametrize(("damage", "kind"), KINDS)
def test_a_damaged_merge_fails_by_name(tmp_path, honest, damage, kind):
    """The tensors proof catches every damage; the logits proof makes the same checks and more."""
    plan, folder = honest
    do_damage, expected = DAMAGES[damage]
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    do_damage(damaged, plan)
    proof = merge_proof.prove_merge(plan, damaged, 2, lambda line: None, kind)
    failed = {check.name for check in proof.failed}
    assert failed >= (expected if kind == "logits" else expected - SEEN_BY_LOADING) > set()
    assert ("tensors" in expected) == ("tensors" in failed)


@pytest.mark.parametrize("kind", ["tensors", "logits"])
def test_an_honest_merge_passes(honest, kind):
    plan, folder = honest
    proof = merge_proof.prove_merge(plan, folder, 2, lambda line: None, kind)
    assert not proof.failed
    assert (proof.distances is None) == (kind == "tensors")
    assert proof.kept == pytest.approx(1, abs=0.01)


def test_the_proof_follows_the_free_memory(monkeypatch):
    monkeypatch.setattr(merge_proof, "available_memory", lambda: 6 * 10**9)
    assert merge_proof.choose_proof(None, 8 * 10**8) == (
        "logits",
        "logits needs about 4.4 GB, 6.0 GB are free",
    )
    assert merge_proof.choose_proof(None, 3 * 10**9)[0] == "tensors"
    assert merge_proof.choose_proof("logits", 3 * 10**9) == ("logits", "--proof logits")


def test_a_greedy_choice_may_flip_only_within_the_logit_bound():
    noise = Distance(0.1, 1e-4, 1.0, 0.0, 100)
    close = check_distance(Distance(0.2, 1e-4, 0.99, 0.25, 100), noise, 3)
    far = check_distance(Distance(0.2, 1e-4, 0.99, 0.35, 100), noise, 3)
    assert [check.passed for check in close] == [True, True, True]
    assert [check.passed for check in far] == [True, True, False]


def test_a_failed_proof_leaves_a_report_and_no_folder(tmp_path, monkeypatch):
    def write_and_damage(plan, folder):
        write_weights(plan, folder)
        change_tensor(folder, Q_PROJ, lambda t: t * 1.01)

    monkeypatch.setattr("lora_grpo.merge.write.write_weights", write_and_damage)
    config = MergeConfig(make_adapter(), tmp_path / "out" / "run", num_prompts=1)
    for name in ("run.failed.json", "run.failed.2.json"):
        with pytest.raises(MergeProofError, match=rf"failed: .*tensors \({Q_PROJ}.*{name}"):
            merge_adapter(config, lambda line: None)
        assert json.loads((tmp_path / "out" / name).read_text())["passed"] is False
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_changes_below_half_an_ulp_that_point_one_way_are_no_fault(tmp_path):
    """After a first step a trained adapter's changes are small and aligned: what rounding loses of
    them moves the model much further than random noise of that size does (17 times in KL)."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"vocab_size": 512, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    model = AutoModelForCausalLM.from_config(Gemma2Config(**shape, **heads, **ids))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 2 else 0.05)
    model.bfloat16().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    knobs = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), knobs
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0)
    problems = generate_problems(8, "test")
    prompts = [render(make_tokenizer(), build_messages(row["question"])) for row in problems]
    for row in continue_greedily(policy, make_tokenizer(), prompts, 32):
        chosen = policy(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
        chosen[range(len(row) - 1), row[1:]][-32:].sum().backward()
    optimizer.step()
    policy.save_pretrained(tmp_path / "run")
    make_tokenizer().save_pretrained(tmp_path / "run")
    report = merge_adapter(
        MergeConfig(tmp_path / "run", tmp_path / "out"), lambda line: None
    ).report
    assert report["passed"]
    lost, whole = report["from_policy"]["mean_kl"], report["bare_base_from_policy"]["mean_kl"]
    assert 0.05 < lost / whole < 1
    assert lost == pytest.approx(report["rounding_noise_from_policy"]["mean_kl"], rel=0.01)
