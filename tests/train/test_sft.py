"""Supervised fine-tuning before GRPO: TRL's own gradient, the right targets, and a kill changes
nothing."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from killed_runs import SMALL, finish, kill_at, lines_of, start, there
from run_directory import contents, read_rows
from trainers import CPU, GradientCatcher, first_problems, make_trainer
from transformers import PrinterCallback
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PLAIN, build_messages
from lora_grpo.data.worked import build_worked
from lora_grpo.machine.files import STAGED
from lora_grpo.report.gather import gather_run
from lora_grpo.report.verdict import compare
from lora_grpo.train.sft import SupervisedTrainer, rows_at_once, sft_arguments

WARM = {**SMALL, "sft_steps": 3, "sft_learning_rate": 3e-3, "max_steps": 4, "beta": 0.1}
GSM8K = Problem(
    row=1,
    question="How many clips?",
    answer="1200",
    solution="She sold 600/2 = <<600/2=300>>300 in May.\nThat is <<600+600=1200>>1200.",
)


def add_noise(model: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("micro_batch", [4, 16])
def test_a_step_equals_trl_s(tmp_path: Path, tokenizer, micro_batch: int) -> None:
    """The first step's gradient and loss, with padding, in micro-batches and at a temperature that
    only sampling has."""
    settings = {"num_generations": 2, "temperature": 0.7}
    settings |= {"per_device_train_batch_size": micro_batch}
    settings |= {"gradient_accumulation_steps": 16 // micro_batch}
    policy = make_trainer(tmp_path, **settings)
    add_noise(policy.model)
    worked, _ = build_worked(first_problems(), PLAIN, tokenizer, 64)
    config = TrainConfig(**{**SMALL, "sft_steps": 1, **settings})
    args = sft_arguments(config, tmp_path, CPU, longest_prompt=160)
    assert args.train_batch_size * args.gradient_accumulation_steps == 8
    args.max_grad_norm = 1e9
    mine = SupervisedTrainer(policy, args, worked)
    rows = mine.train_dataset
    mine_caught, theirs_caught = GradientCatcher(), GradientCatcher()
    mine.add_callback(mine_caught)
    loss = mine.train().training_loss

    theirs = make_trainer(tmp_path, GRPOTrainer, **settings).model
    add_noise(theirs)
    columns = [
        {
            "input_ids": row.prompt_ids + row.completion_ids,
            "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.completion_ids),
        }
        for row in rows
    ]
    sft = SFTTrainer(
        theirs,
        SFTConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8,
            completion_only_loss=True,
            shuffle_dataset=False,
            max_grad_norm=1e9,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
    )
    sft.remove_callback(PrinterCallback)
    sft.add_callback(theirs_caught)
    assert abs(loss - sft.train().training_loss) < 1e-5
    assert mine_caught.gradients.keys() == theirs_caught.gradients.keys()
    for name, gradient in theirs_caught.gradients.items():
        assert (mine_caught.gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_the_target_is_the_worked_solution_up_to_the_end_of_the_turn(tmp_path, tokenizer) -> None:
    [found], note = build_worked([GSM8K], PLAIN, tokenizer, 512)
    text = tokenizer.decode(found.completion_ids)
    assert text == (
        "<reasoning>\nShe sold 600/2 = 300 in May.\nThat is 1200.\n</reasoning>\n"
        "<answer>\n1200\n</answer><|im_end|>"
    )
    policy = make_trainer(tmp_path)
    assert found.completion_ids[-1] in policy.eos_token_ids
    prompts, *_ = policy._tokenize_prompts([build_messages(GSM8K.question)])
    assert found.prompt_ids == prompts[0]
    assert note == "1 of 1 problems have a worked solution"


def test_a_solution_that_the_model_could_not_write_is_left_out(tokenizer) -> None:
    bare = dataclasses.replace(GSM8K, solution=None)
    tagged = dataclasses.replace(GSM8K, solution="It is <answer>1200</answer>.")
    limit = len(build_worked([GSM8K], PLAIN, tokenizer, 512)[0][0].completion_ids)
    long = dataclasses.replace(GSM8K, solution=f"{GSM8K.solution} So it is.")
    found, note = build_worked([bare, tagged, GSM8K, long], PLAIN, tokenizer, limit)
    assert len(found) == 1 and "1 of 4" in note and f"1 of more than {limit} tokens" in note
    with pytest.raises(ValueError, match=r"--sft-steps .*none of the 2 training problems"):
        build_worked([bare, tagged], PLAIN, tokenizer, 512)
    with pytest.raises(ValueError, match="--max-completion-length 5"):
        build_worked([GSM8K], PLAIN, tokenizer, 5)


def test_what_the_template_writes_of_the_answer_is_no_target(tokenizer) -> None:
    begun = dataclasses.replace(PLAIN, prefill="<reasoning>\n")
    [found], _ = build_worked([GSM8K], begun, tokenizer, 512)
    assert tokenizer.decode(found.completion_ids).startswith("She sold")
    with pytest.raises(ValueError, match="--sft-steps"):
        build_worked([GSM8K], dataclasses.replace(PLAIN, prefill="<think>\n"), tokenizer, 512)


@pytest.mark.parametrize(("size", "accumulation", "group"), [(1, 8, 2), (8, 8, 8), (16, 1, 4)])
def test_a_micro_batch_has_no_more_tokens_than_grpo_s(size, accumulation, group) -> None:
    config = TrainConfig(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        num_generations=group,
        max_completion_length=100,
    )
    for prompt in (1, 50, 1000):
        rows = rows_at_once(config, prompt)
        assert config.prompts_per_step % rows == 0
        assert rows == 1 or rows * (prompt + 100) <= prompt + size * 100


@pytest.fixture(scope="module")
def warm_run(children, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a warm-up that nothing disturbed."""
    home = tmp_path_factory.mktemp("warm")
    finish(children, home / "outcome", **WARM, adapters_dir=home, run_name="run")
    return home / "run"


def test_the_stage_is_recorded_and_evaluated_by_itself(warm_run: Path) -> None:
    rows = read_rows(warm_run / "start/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [round(row["learning_rate"], 6) for row in rows] == [0.003, 0.002, 0.001]
    metrics = read_rows(warm_run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert abs(metrics[0]["kl"]) < 1e-6 < metrics[3]["kl"], "the reference is the warmed-up adapter"
    assert [row["step"] for row in read_rows(warm_run / "validation.jsonl")] == [0, 2, 4]
    report = json.loads((warm_run / "eval.json").read_text())
    assert report["base"].keys() == report["sft"].keys() == report["adapter"].keys()
    items = read_rows(warm_run / "eval_items.jsonl")
    assert {"base", "sft", "adapter"} <= items[0].keys() and "mcnemar_p_sft" in report
    assert [item["sft"]["strict"] for item in items].count(True) == (
        report["sft"]["strict_accuracy"] * len(items)
    )
    record = json.loads((warm_run / "train_config.json").read_text())
    assert (record["sft_steps"], record["sft_learning_rate"]) == (3, 3e-3)


MOMENTS = {
    "a step of the warm-up was logged": (lines_of("start/metrics.jsonl", 1), 0.0),
    "its checkpoint is there": (there("start/checkpoint-2"), 0.0),
    "the warm-up has ended": (there("start/adapter_model.safetensors"), 0.0),
    "the first step of GRPO was logged": (lines_of("metrics.jsonl", 1), 0.0),
    "GRPO has a checkpoint": (there("checkpoint-2"), 0.05),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_changes_nothing(children, warm_run: Path, tmp_path: Path, moment: str) -> None:
    reached, delay = MOMENTS[moment]
    run, outcome = tmp_path / "run", tmp_path / "outcome"
    process = start(children, outcome, **WARM, adapters_dir=tmp_path, run_name="run")
    kill_at(process, lambda: reached(run), delay)
    finish(children, outcome, resume=run)
    assert contents(run) == contents(warm_run)


def test_sigterm_within_the_warm_up_saves(children, warm_run: Path, tmp_path: Path) -> None:
    run, outcome = tmp_path / "run", tmp_path / "outcome"
    process = start(children, outcome, **WARM, adapters_dir=tmp_path, run_name="run")
    while not lines_of("start/metrics.jsonl", 1)(run):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert outcome.read_text() == "SIGTERM" and not (run / "metrics.jsonl").exists()
    assert any((run / "start").glob("*")), "the stage was saved"
    finish(children, outcome, resume=run)
    assert contents(run) == contents(warm_run)


def test_card_and_verdict_do_not_take_the_warm_up_for_grpo_s_work(warm_run: Path) -> None:
    card = (warm_run / "README.md").read_text()
    assert "| base | after warm-up | adapter |" in card
    report = json.loads((warm_run / "eval.json").read_text())
    outcome, _ = compare(gather_run(warm_run, 10**6))
    assert f"p = {report['mcnemar_p_sft']:.2g}" in outcome and "after warm-up" in outcome


def test_what_a_kill_left_of_saving_the_start_is_removed(
    children, warm_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(warm_run, run)
    half = run / "start" / f"{STAGED}adapter.half"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    (run / "eval.json").unlink()
    finish(children, tmp_path / "outcome", resume=run)
    assert contents(run) == contents(warm_run)
