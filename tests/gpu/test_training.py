"""The transformers backend on a GPU: 4-bit base, LoRA, GRPO steps, float16, merge, evaluation."""

import json

import pytest
from gpu_machine import ON_CPU, ROOT, lacks, read_json, run
from trained_runs import KINDS, RUN_SECONDS, check_run, merge, train

# A GPU adds up in another order when the batch differs, so a close call may fall the other way.
ITEMS_THAT_MAY_DIFFER = 2
SAMPLER_DISTANCE = 0.1  # nats, mean over tokens: 16-bit rounding on two paths
with_vllm = pytest.mark.needs("vllm")


def kinds(*names: str) -> list:
    return [pytest.param(kind, marks=[with_vllm] if "vllm" in kind else []) for kind in names]


@pytest.mark.parametrize("kind", kinds("generate", "generate-float16", "vllm", "vllm-float16"))
def test_a_run_trains_and_leaves_the_whole_adapter_directory(out, figure, kind: str) -> None:
    rows = check_run(train(out, kind), kind)
    figure(f"{kind}: seconds of the last step", rows[-1]["seconds"], "s")
    if "vllm" in kind:
        distance = max(row["sampler_logprob_difference"] for row in rows)
        figure(f"{kind}: vLLM's log-probs from the trainer's, mean", distance, "nats")
        assert distance < SAMPLER_DISTANCE


@pytest.mark.parametrize("kind", kinds("generate", "generate-float16", "vllm"))
def test_the_adapter_is_float32_whatever_the_base_computes_in(out, kind: str) -> None:
    directory = train(out, kind)
    with (directory / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"F32"}


@pytest.mark.parametrize("kind", kinds("generate", "vllm"))
def test_an_evaluation_repeats_the_runs_own_figures(out, figure, kind: str) -> None:
    directory, output = train(out, kind), out / f"again-{kind}.json"
    output.unlink(missing_ok=True)
    output.with_name(f"{output.stem}_items.jsonl").unlink(missing_ok=True)
    flags = ("--rollout", "vllm" if kind == "vllm" else "generate", "--output", output)
    script = ROOT / "scripts" / "evaluate.py"
    run(out / "logs" / f"evaluate-{kind}.log", RUN_SECONDS, script, directory, *flags)
    before, after = read_json(directory / "eval.json"), read_json(output)
    for model in ("base", "adapter"):
        items = before["num_items"]
        apart = abs(before[model]["strict_accuracy"] - after[model]["strict_accuracy"]) * items
        figure(f"{kind}: items judged otherwise at the second evaluation, {model}", apart)
        assert apart <= ITEMS_THAT_MAY_DIFFER + 1e-6


@pytest.mark.parametrize("kind", kinds("generate", "generate-float16", "vllm"))
def test_merge_of_what_was_trained(out, figure, kind: str) -> None:
    report = merge(out, train(out, kind), kind)
    assert report["passed"]
    for name in ("from_policy", "rounding_noise_from_policy", "bare_base_from_policy"):
        figure(f"{kind}: merge, mean KL of {name}", report[name]["mean_kl"], "nats per token")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_was_trained_left_the_same_files(out, kind: str) -> None:
    if not (out / "adapters" / kind / "eval.json").is_file():
        needs = [need for need in ("vllm", "unsloth") if need in kind]
        lacking = next(filter(None, map(lacks, needs)), "its stage has not been run into GPU_OUT")
        pytest.skip(f"no run of {kind}: {lacking}")
    check_run(out / "adapters" / kind, kind)
    assert ON_CPU or read_json(out / "adapters" / kind / "train_config.json")["device"]
