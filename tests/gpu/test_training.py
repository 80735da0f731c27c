"""Every backend, rollout and type: 4-bit base, LoRA, GRPO steps, saving, evaluation, merge.

What unsloth trained is evaluated and merged without unsloth.
"""

import json

import pytest
from gpu_machine import SCRIPTS, run
from trained_runs import KINDS, RUN_SECONDS, check_run, merge, train

from lora_grpo.machine.files import read_json

# A GPU adds up in another order when the batch differs, so a close call may fall the other way.
ITEMS_THAT_MAY_DIFFER = 2
SAMPLER_DISTANCE = 0.1  # nats, mean over tokens: 16-bit rounding on two paths
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.needs(*(name for name in ("unsloth", "vllm") if name in kind)),
        )
        for kind in KINDS
    ],
)


@every_kind
def test_a_run_trains_and_leaves_the_whole_adapter_directory(out, figure, kind: str) -> None:
    rows = check_run(train(out, kind), kind)
    figure(f"{kind}: seconds of the last step", rows[-1]["seconds"], "s")
    if kind.startswith("vllm"):
        distance = max(row["sampler_logprob_difference"] for row in rows)
        figure(f"{kind}: vLLM's log-probs from the trainer's, mean", distance, "nats")
        assert distance < SAMPLER_DISTANCE


@every_kind
def test_the_adapter_is_float32_whatever_the_base_computes_in(out, kind: str) -> None:
    with (train(out, kind) / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"F32"}


@every_kind
def test_an_evaluation_repeats_the_runs_own_figures(out, figure, tmp_path, kind: str) -> None:
    directory, output = train(out, kind), tmp_path / "again.json"
    rollout = "vllm" if kind.startswith("vllm") else "generate"
    flags = (directory, "--rollout", rollout, "--output", output)
    run(out / "logs" / f"evaluate-{kind}.log", RUN_SECONDS, SCRIPTS / "evaluate.py", *flags)
    before, after = read_json(directory / "eval.json"), read_json(output)
    assert after["num_items"] == before["num_items"]
    for model in ("base", "adapter"):
        apart = abs(before[model]["strict_accuracy"] - after[model]["strict_accuracy"])
        apart *= before["num_items"]
        figure(f"{kind}: items judged otherwise at the second evaluation, {model}", apart)
        # Two backends may differ by more.
        assert "unsloth" in kind or apart <= ITEMS_THAT_MAY_DIFFER + 1e-6


@every_kind
def test_merge_of_what_was_trained(out, figure, kind: str) -> None:
    report = merge(out, train(out, kind), kind)
    assert report["passed"]
    for name in ("from_policy", "rounding_noise_from_policy", "bare_base_from_policy"):
        figure(f"{kind}: merge, mean KL of {name}", report[name]["mean_kl"], "nats per token")
