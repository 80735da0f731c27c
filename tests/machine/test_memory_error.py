"""Running out of memory changes how much is done at once, never what comes out."""

import contextlib
import dataclasses
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import FEW, run_here
from hypothesis import given
from hypothesis import strategies as st
from trainers import SMALL, GradientCatcher, make_trainer

from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.grpo import packed_update
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.machine.files import read_jsonl
from lora_grpo.machine.out_of_memory import (
    MemoryExhaustedError,
    RowLimit,
    is_out_of_memory,
    largest_part,
)
from lora_grpo.memory.shape import read_shape
from lora_grpo.memory.terms import Job
from lora_grpo.memory.update import prompts_at_once, update_tokens
from lora_grpo.policy.base import EMBEDDED_FOLDER
from lora_grpo.policy.generate import complete
from lora_grpo.train.command import advise_on_memory
from lora_grpo.train.largest import LargestFirst, might_not_fit
from lora_grpo.train.plan import make_plan

CPU_MESSAGE = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError(CPU_MESSAGE), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory."), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@given(st.integers(1, 200), st.integers(1, 200))
def test_parts_are_equal_and_as_large_as_allowed(whole: int, limit: int) -> None:
    size = largest_part(whole, limit)
    assert whole % size == 0 and size <= limit
    assert not [s for s in range(size + 1, min(whole, limit) + 1) if whole % s == 0]


def test_a_limit_halves_until_the_work_fits_and_stays_there() -> None:
    """The failed work's tensors are gone before it is repeated."""
    said, tried, alive = [], [], []

    def release() -> None:
        gc.collect()
        assert alive[-1]() is None

    def job(rows: int) -> int:
        tensor = torch.zeros(rows)
        alive.append(weakref.ref(tensor))
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return rows

    limit = RowLimit("the update", said.append, release)
    assert [limit.run(job, 12), limit.run(job, 12)] == [3, 3]
    assert tried == [12, 6, 3, 3] and len(said) == 2
    assert "12 completions" in said[0] and "3 at once, 4 times" in said[1]


@pytest.mark.parametrize(
    ("message", "tried", "error"),
    [
        (CPU_MESSAGE, [4, 2, 1], r"out of memory in scoring, one at a time: .*CPUAllocator"),
        ("shape mismatch", [4], "shape mismatch"),
    ],
)
def test_one_row_that_does_not_fit_and_another_error_are_the_end(message, tried, error) -> None:
    calls = []

    def job(rows: int) -> int:
        calls.append(rows)
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=error):
        RowLimit("scoring", lambda text: None, release=lambda: None).run(job, 4)
    assert calls == tried


def count_rows(inputs: dict) -> int:
    """Return the completions that a forward pass holds, packed or one a row."""
    if "groups" in inputs:
        return sum(len(group.slots) for group in inputs["groups"])
    return len(inputs["input_ids"])


@contextlib.contextmanager
def small_memory(rows: int, where: str) -> Iterator[list[int]]:
    """Let PyTorch run out of memory in every forward or backward pass of more rows than these.

    `where` is "update forward", "update backward", "scoring" or "generation".
    """
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

    plain, raised = Qwen2Model.forward, []

    def give_out(count: int) -> None:
        raised.append(count)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    def forward(self, *args, **kwargs):
        count, training = count_rows(kwargs), torch.is_grad_enabled()
        sampling = kwargs.get("use_cache") or "decoding" in kwargs
        phase = "update" if training else "generation" if sampling else "scoring"
        if count > rows and where in (phase, f"{phase} forward"):
            give_out(count)
        if count > rows and training and where == "update backward":
            # At the first layer, when the last ones have their gradients already.
            self.layers[0].mlp.register_full_backward_hook(lambda *_: give_out(count))
        return plain(self, *args, **kwargs)

    Qwen2Model.forward = forward
    try:
        yield raised
    finally:
        Qwen2Model.forward = plain


def train(tmp_path: Path, **knobs):
    said: list[str] = []
    trainer = make_trainer(tmp_path, max_grad_norm=1e9, say=said.append, **knobs)
    catcher = GradientCatcher()
    trainer.add_callback(catcher)
    return trainer, catcher, said


def clear_hooks(trainer) -> None:
    for module in trainer.model.modules():
        module._backward_hooks.clear()


@pytest.mark.parametrize(
    ("loss_type", "load_in_4bit", "where"),
    [
        ("dapo", True, "update forward"),
        ("grpo", False, "update forward"),
        ("dr_grpo", False, "update forward"),
        ("cispo", False, "update forward"),
        ("dapo", False, "update backward"),
    ],
)
def test_the_gradient_is_the_one_without_the_error(
    tmp_path: Path, loss_type: str, load_in_4bit: bool, where: str
) -> None:
    knobs = {
        "loss_type": loss_type,
        "load_in_4bit": load_in_4bit,
        "seed": 2,  # every group has a signal
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    whole, whole_catcher, _ = train(tmp_path, **knobs)
    whole.train()
    trainer, catcher, said = train(tmp_path, **knobs)
    trainer.update_rows.release = lambda: clear_hooks(trainer)
    with small_memory(2, where) as raised:
        trainer.train()
    assert set(raised) == {8, 4} and len(said) == len(raised)
    assert trainer.step.batch.completions == whole.step.batch.completions
    assert max(gradient.abs().max() for gradient in whole_catcher.gradients.values()) > 1e-4
    for name, gradient in whole_catcher.gradients.items():
        torch.testing.assert_close(catcher.gradients[name], gradient, rtol=1e-4, atol=1e-7)
    mine, theirs = trainer.state.log_history[0], whole.state.log_history[0]
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def train_largest_first(tmp_path: Path, length: int, **knobs):
    config = TrainConfig(**{**SMALL, **knobs})
    trainer, _, said = train(tmp_path, **knobs)
    trainer.callback_handler.callbacks.insert(0, LargestFirst(trainer, config, length, "cpu"))
    return trainer, said


@pytest.mark.parametrize(
    "knobs",
    [
        {"lora_dropout": 0.1, "beta": 0.1, "max_steps": 2},
        {"num_iterations": 2, "max_steps": 2, "save_steps": 2, "loss_type": "grpo"},
        {"shared_prefix": False},
    ],
)
def test_the_largest_micro_batch_changes_nothing(tmp_path: Path, knobs: dict) -> None:
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    plain, _, _ = train(tmp_path, **sizes, **knobs)
    plain.train()
    trainer, said = train_largest_first(tmp_path, 90, **sizes, **knobs)
    trainer.train()
    assert len(said) == 1 and "8 x 40 of completions" in said[0]
    for mine, expected in zip(trainer.trained, plain.trained, strict=True):
        assert torch.equal(mine, expected)
    times = ("time", "runtime", "per_second")
    for mine, expected in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        assert mine.keys() == expected.keys()
        same = [name for name in mine if not any(word in name for word in times)]
        assert len(same) > 2
        assert repr([mine[name] for name in same]) == repr([expected[name] for name in same])


@pytest.mark.parametrize("generations", [4, 16])
def test_the_largest_micro_batch_has_the_planned_tokens(
    tmp_path: Path, generations: int, monkeypatch
) -> None:
    """None of the run is larger, and the memory plan counts with the same."""
    knobs = {
        "num_generations": generations,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
    }
    trainer, _ = train_largest_first(tmp_path, 90, **knobs)
    counts, plain = [], packed_update.pack

    def counting(*arguments):
        counts.append(plain(*arguments))
        return counts[-1]

    monkeypatch.setattr(packed_update, "pack", counting)
    trainer.train()
    tokens = [packed.input_ids.numel() for packed in counts]
    shape, config = read_shape(EMBEDDED_FOLDER), TrainConfig(**{**SMALL, **knobs})
    job = Job(shape, config, "transformers", "generate", "cpu", "float32", 90)
    assert tokens[0] == update_tokens(job) and max(tokens[1:]) < tokens[0]
    assert len(counts[0].groups) == prompts_at_once(job) == (2 if generations == 4 else 1)


def test_memory_that_runs_out_does_so_before_the_first_step(tmp_path: Path) -> None:
    knobs = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer, said = train_largest_first(tmp_path, 90, **knobs)
    with small_memory(2, "update forward") as raised:
        trainer.train()
    assert raised == [8, 4] and trainer.state.global_step == 2
    assert ["out of memory" in line for line in said] == [True, True, False]


def test_the_largest_micro_batch_is_tried_where_the_plan_leaves_doubt(tmp_path: Path) -> None:
    plan = make_plan(parse_train_config(["--preset", "tiny", "--adapters-dir", str(tmp_path)])[0])
    peak = plan.memory.peak_bytes
    tried = [
        might_not_fit(
            dataclasses.replace(
                plan, memory=dataclasses.replace(plan.memory, budget_bytes=int(budget * peak))
            )
        )
        for budget in (1.1, 1.9, 2.1)
    ]
    assert tried == [True, True, False]
    assert might_not_fit(dataclasses.replace(plan, memory=None))


def test_bnpo_whose_loss_depends_on_the_parts_is_not_split(tmp_path: Path) -> None:
    knobs = {"loss_type": "bnpo", "gradient_accumulation_steps": 1}
    trainer, _, said = train(tmp_path, **knobs)
    with (
        small_memory(2, "update forward"),
        pytest.raises(MemoryExhaustedError, match="in the update, 16 at a time"),
    ):
        trainer.train()
    assert not said


def test_evaluation_goes_on_with_fewer_prompts(tmp_path: Path) -> None:
    trainer, _, _ = train(tmp_path, load_in_4bit=True)
    prompts, said = [f"What is {n} + {n}?" for n in range(12)], []
    ask = (trainer.model, trainer._tokenizer, prompts, 8, 12)
    expected, heard = complete(*ask), []
    limit = RowLimit("evaluation", said.append)
    with small_memory(3, "generation") as raised:
        assert complete(*ask, heard.append, limit) == expected
        assert complete(*ask, heard.append, limit) == expected
    assert raised == [12, 6] and len(said) == 2 and heard == [12, 12]


def test_generation_goes_on_with_fewer_sequences(tmp_path: Path) -> None:
    trainer, _, said = train(tmp_path)
    with small_memory(4, "generation") as raised:
        trainer.train()
    assert raised == [16, 8] and all("in generation" in line for line in said)
    assert len(trainer.step.batch.completions) == 16 and trainer.state.global_step == 1


def test_scoring_goes_on_with_fewer_rows(tmp_path: Path) -> None:
    knobs = {"num_iterations": 2, "save_steps": 2, "max_steps": 2, "beta": 0.1}
    whole, _, _ = train(tmp_path, **knobs)
    whole.train()
    trainer, _, said = train(tmp_path, **knobs)
    with small_memory(4, "scoring") as raised:
        trainer.train()
    assert raised[:2] == [16, 8] and all("in scoring" in line for line in said)
    for mine, theirs in zip(
        trainer.state.log_history[:2], whole.state.log_history[:2], strict=True
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_a_run_that_cannot_go_on_says_how_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LoraGRPOTrainer.training_step

    def third_step_does_not_fit(self, *arguments):
        if self.state.global_step < 2:
            return plain(self, *arguments)
        with small_memory(0, "update forward"):
            return plain(self, *arguments)

    few = (*FEW, "--max-steps", 3)
    monkeypatch.setattr(LoraGRPOTrainer, "training_step", third_step_does_not_fit)
    done = run_here("train_lora.py", *few, home=tmp_path)
    monkeypatch.undo()
    assert done.returncode == 1
    assert "out of memory in the update with 8 completions at once" in done.stdout
    error, advice = done.stderr.strip().splitlines()
    assert error.startswith("error: out of memory in the update, one at a time: CUDA out of memory")
    assert advice.startswith("the plan was: fits: peak") and "--gradient-checkpointing" in advice
    resume = ("train_lora.py", "--resume", "adapters/run", "--gradient-checkpointing")
    wrong = run_here(*resume, "--gradient-accumulation-steps", 2, home=tmp_path)
    assert wrong.returncode == 2 and "was 8 x 1, now 8 x 2" in wrong.stderr
    parts = ("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2)
    assert run_here(*resume, *parts, home=tmp_path).returncode == 0
    saved = json.loads((tmp_path / "adapters/run/train_config.json").read_text())
    assert saved["gradient_checkpointing"] and saved["per_device_train_batch_size"] == 4
    assert run_here("train_lora.py", *few, "--run-name", "whole", home=tmp_path).returncode == 0
    rows, whole = (
        read_jsonl(tmp_path / "adapters" / name / "metrics.jsonl") for name in ("run", "whole")
    )
    assert len(rows) == 3
    for mine, theirs in zip(rows, whole, strict=True):
        assert mine["reward"] == theirs["reward"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["peak_memory_bytes"] > 2**28 and mine["predicted_memory_bytes"] > 2**28


@pytest.mark.parametrize(
    ("work", "flag", "advice"),
    [
        ("the update", "--no-gradient-checkpointing", "add --gradient-checkpointing"),
        ("the update", "--gradient-checkpointing", "nothing is left to save"),
        ("scoring", "--no-gradient-checkpointing", "nothing is left to save"),
    ],
)
def test_only_what_helps_is_advised(tmp_path: Path, work: str, flag: str, advice: str) -> None:
    arguments = ["--preset", "tiny", "--adapters-dir", str(tmp_path), flag]
    plan = make_plan(parse_train_config(arguments)[0])
    assert advice in advise_on_memory(plan, MemoryExhaustedError(work, CPU_MESSAGE))
