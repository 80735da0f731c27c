"""The unsloth backend: 4-bit load, LoRA, GRPO steps and save; then merge and evaluation without it.

First without vLLM, then with unsloth's own vLLM on the same weights.
"""

import pytest
from gpu_machine import ROOT, read_json, run
from trained_runs import RUN_SECONDS, check_run, merge, train

KINDS = ["unsloth-generate", pytest.param("unsloth-vllm", marks=pytest.mark.needs("vllm"))]


@pytest.mark.needs("unsloth")
@pytest.mark.parametrize("kind", KINDS)
def test_unsloth_loads_in_4bit_trains_and_saves(out, figure, kind: str) -> None:
    rows = check_run(train(out, kind), kind)
    figure(f"{kind}: seconds of the last step", rows[-1]["seconds"], "s")


@pytest.mark.needs("unsloth")
@pytest.mark.parametrize("kind", KINDS)
def test_merge_of_what_unsloth_trained_without_unsloth(out, figure, kind: str) -> None:
    report = merge(out, train(out, kind), kind)
    assert report["passed"]
    figure(f"{kind}: merge, mean KL", report["from_policy"]["mean_kl"], "nats per token")


@pytest.mark.needs("unsloth")
@pytest.mark.parametrize("kind", KINDS)
def test_what_unsloth_trained_answers_on_the_other_backend(out, figure, kind: str) -> None:
    directory, output = train(out, kind), out / f"again-{kind}.json"
    output.unlink(missing_ok=True)
    output.with_name(f"{output.stem}_items.jsonl").unlink(missing_ok=True)
    script = ROOT / "scripts" / "evaluate.py"
    flags = ("--rollout", "generate", "--output", output)
    run(out / "logs" / f"evaluate-{kind}.log", RUN_SECONDS, script, directory, *flags)
    own, other = read_json(directory / "eval.json"), read_json(output)
    for model in ("base", "adapter"):
        figure(f"{kind}: strict, {model}, by unsloth", own[model]["strict_accuracy"])
        figure(f"{kind}: strict, {model}, by transformers", other[model]["strict_accuracy"])
    assert other["num_items"] == own["num_items"]
