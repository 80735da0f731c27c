"""Groups without a signal are replaced, and the batch is then what TRL would have made of it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from trainers import make_trainer
from transformers import TrainerCallback
from trl import GRPOTrainer
from update_cases import (
    GROUPS,
    LENGTHS,
    PROMPTS,
    G,
    crafted_batch,
    learn,
    prepare,
    worst_difference,
)

from lora_grpo.data.problems import load_problems
from lora_grpo.data.prompt import PLAIN, build_messages, render
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.groups import Draw, Replacements, dead_groups, join
from lora_grpo.grpo.settings import dataset_rows
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.grpo.vllm_rollout import sample_with_vllm
from lora_grpo.rewards.builtin import Reward
from lora_grpo.tasks.task import Verdict
from lora_grpo.train.console import Display
from lora_grpo.train.recorder import describe_step

PAD = 99
PROBLEMS = load_problems("arithmetic")[:64]
ROWS = dataset_rows(PROBLEMS, PLAIN)
STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


# Joining


def batch_of(lengths: list[int], rewards: list[float], name: str = "draw") -> Batch:
    count = len(lengths)
    names = [f"{name} {row}" for row in range(count)]
    verdicts = [Verdict(name, True, True) for name in names]
    return Batch(names, names, names, lengths, [False] * count, {"reward": rewards}, verdicts)


def ragged_draw(seed: int, ratio_by_token: bool) -> Draw:
    """Return a draw as TRL pads it, some of its completions masked as truncated."""
    draw = torch.Generator().manual_seed(seed)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(1, high, shape, generator=draw)

    rows = int(whole(5, 1))
    prompts, lengths = whole(9, rows), whole(9, rows)
    width, length = int(prompts.max()), int(lengths.max())
    prompt_mask = (torch.arange(width) >= width - prompts[:, None]).long()
    there = (torch.arange(length) < lengths[:, None]).long()
    counts = torch.rand(rows, 1, generator=draw) < 0.7
    log_probs = torch.randn(rows, length, generator=draw)
    ratio = log_probs.exp() if ratio_by_token else torch.rand(rows, 1, generator=draw)
    output = {
        "prompt_ids": torch.where(prompt_mask.bool(), whole(50, rows, width), PAD),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.where(there.bool(), whole(50, rows, length), PAD),
        "completion_mask": there * counts,
        "advantages": torch.randn(rows, generator=draw),
        "old_per_token_logps": log_probs,
        "ref_per_token_logps": log_probs - 1,
        "sampling_per_token_logps": log_probs + 1,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": torch.tensor(-1),
    }
    return Draw(output, batch_of(lengths.tolist(), [0.5] * rows, f"draw {seed}"))


def join_slowly(draws: list[Draw], kept: list[int], by_row: set[str]) -> dict[str, list]:
    """Return what `join` should, row by row and value by value."""
    places = [(draw, row) for draw in draws for row in range(len(draw.batch.tokens))]
    chosen = [places[index] for index in kept]
    longest_prompt = max(int(draw.output["prompt_mask"][row].sum()) for draw, row in chosen)
    longest = max(draw.batch.tokens[row] for draw, row in chosen)
    joined: dict[str, list] = {name: [] for name in draws[0].output}
    for draw, row in chosen:
        for name, value in draw.output.items():
            if name == "num_items_in_batch":
                continue
            found = value[row].tolist()
            if name.startswith("prompt"):
                size = int(draw.output["prompt_mask"][row].sum())
                fill = PAD if name == "prompt_ids" else 0
                found = [fill] * (longest_prompt - size) + found[len(found) - size :]
            elif name not in by_row:
                fill = {"completion_ids": PAD, "importance_sampling_ratio": 1}.get(name, 0)
                # Within a draw TRL has padded already, with whatever it pads with.
                found = (found + [fill] * longest)[:longest]
            joined[name].append(found)
    joined["num_items_in_batch"] = sum(map(sum, joined["completion_mask"]))
    return joined


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.randoms(use_true_random=False))
def test_ragged_draws_are_joined_as_a_loop_would(
    seed: int, by_token: bool, draw: random.Random
) -> None:
    draws = [ragged_draw(seed + index, by_token) for index in range(3)]
    total = sum(len(part.batch.tokens) for part in draws)
    kept = draw.sample(range(total), draw.randint(1, total))
    found = join(draws, kept, PAD)
    by_row = {"advantages"} | (set() if by_token else {"importance_sampling_ratio"})
    wanted = join_slowly(draws, kept, by_row)
    assert found.output.keys() == wanted.keys()
    for name, values in wanted.items():
        expected = torch.tensor(values, dtype=found.output[name].dtype)
        assert torch.equal(found.output[name], expected), name
        assert found.output[name].dtype == draws[0].output[name].dtype
    names = [name for part in draws for name in part.batch.questions]
    lengths = [count for part in draws for count in part.batch.tokens]
    assert found.batch.questions == [names[index] for index in kept]
    assert found.batch.tokens == [lengths[index] for index in kept]
    assert found.batch.dropped_completions == total - len(kept)
    assert found.batch.dropped_tokens == sum(lengths) - sum(found.batch.tokens)


def test_a_tensor_that_is_not_known_is_not_dropped() -> None:
    draws = [ragged_draw(seed, True) for seed in (1, 2)]
    draws[1].output["tool_mask"] = draws[1].output["completion_mask"]
    with pytest.raises(ValueError, match="--dynamic-sampling cannot join TRL's tool_mask: leave"):
        join(draws, [0], PAD)


# The update on a joined batch


def part_of(batch: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    """Return some rows as TRL pads them where they are sampled alone."""
    width = int(batch["prompt_mask"][rows].sum(1).max())
    length = int(batch["completion_mask"][rows].sum(1).max())
    parts = {name: value[rows] for name, value in batch.items() if value.ndim}
    parts |= {name: value[:, -width:] for name, value in parts.items() if name[:6] == "prompt"}
    by_token = [name for name, value in parts.items() if value.ndim == 2 and name[:6] != "prompt"]
    return parts | {name: parts[name][:, :length] for name in by_token}


def with_longer_dead_groups(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one group's rows followed by two longer groups without advantages."""
    dead = {
        name: torch.full((2 * G, 20 if name[:6] != "prompt" else 15), 1).to(value.dtype)
        for name, value in part.items()
        if value.ndim == 2
    }
    dead["advantages"] = torch.zeros(2 * G)
    joined = {}
    for name, value in part.items():
        if value.ndim == 2:
            room = dead[name].shape[1] - value.shape[1]
            fill = 1 if name == "importance_sampling_ratio" else 0
            value = pad(value, (room, 0) if name[:6] == "prompt" else (0, room), value=fill)
        joined[name] = torch.cat([value, dead[name]])
    return joined


@pytest.mark.parametrize(
    ("loss_type", "old", "beta"),
    [("dapo", False, 0.0), ("dapo", True, 0.1), ("grpo", False, 0.0), ("vespo", True, 0.0)],
)
def test_the_update_equals_plain_trl_s_on_the_same_rows(
    tmp_path: Path, monkeypatch, loss_type: str, old: bool, beta: float
) -> None:
    def ready(kind: type) -> tuple[GRPOTrainer, int, dict[str, torch.Tensor]]:
        trainer, accumulation = prepare(tmp_path, kind, 4, beta, loss_type=loss_type)
        trainer.model.train()
        batch = crafted_batch(trainer, (), (), old, beta)
        noise = torch.rand(batch["completion_mask"].shape, generator=torch.Generator())
        mask = batch["completion_mask"]
        batch["importance_sampling_ratio"] = torch.where(mask.bool(), 0.5 + noise, 1.0)
        return trainer, accumulation, batch

    plain, accumulation, by_hand = ready(GRPOTrainer)
    plain._generate_and_score_completions = lambda inputs: by_hand
    expected_loss, expected = learn(plain, accumulation)

    trainer, accumulation, batch = ready(LoraGRPOTrainer)
    live, dead = [float(row) for row in range(G)], [0.0] * G
    groups = [list(range(start, start + G)) for start in range(0, G * GROUPS, G)]
    lengths = [[LENGTHS[row] for row in group] for group in groups]
    first = with_longer_dead_groups(part_of(batch, groups[0]))
    second = part_of(batch, groups[1] * 2)
    second["advantages"][G:] = 0
    draws = [
        (first, batch_of(lengths[0] + [20] * 2 * G, live + 2 * dead)),
        (second, batch_of(lengths[1] * 2, live + dead)),
        (part_of(batch, groups[2]), batch_of(lengths[2], live)),
    ]

    def sampled(self: LoraGRPOTrainer, inputs: list) -> dict[str, torch.Tensor]:
        output, self.step.batch = draws.pop(0)
        return output | {"num_items_in_batch": output["completion_mask"].sum()}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", sampled)
    trainer.replacements = Replacements(ROWS, rounds=3, seed=0)
    loss, gradients = learn(trainer, accumulation)
    assert not draws and trainer.step.batch.dropped_tokens == 2 * G * 20 + sum(lengths[1])
    assert {b["prompt_ids"].shape[1] for b in trainer._buffered_inputs} == {max(PROMPTS)}
    assert {b["completion_ids"].shape[1] for b in trainer._buffered_inputs} == {max(LENGTHS)}
    assert abs(loss - expected_loss) < 1e-4 * max(abs(expected_loss), 1e-2)
    assert worst_difference(gradients, expected) < 1e-4


# Whole steps


def rewarding(dead: Callable[[str], bool]) -> tuple[list[Reward], list[dict[str, Any]]]:
    """Return a reward that tells a group's completions apart, but not those of dead questions;
    and the columns that it was called with."""
    calls: list[dict[str, Any]] = []

    def place(completions: list, question: list[str], **columns: Any) -> list[float]:
        calls.append({"completions": completions, "question": question, **columns})
        return [0.0 if dead(q) else float(row % G) for row, q in enumerate(question)]

    return [Reward("place", place)], calls


class AtEachStep(TrainerCallback):
    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.look()


def logged_rows(trainer: LoraGRPOTrainer) -> list[tuple]:
    """Return prompt, completion, tokens and advantage of each row that the logs show."""
    batch, rows = trainer.step.batch, []
    totals = torch.tensor(batch.totals()).view(-1, G)
    spread = totals.std(1, keepdim=True) + 1e-4
    advantages = ((totals - totals.mean(1, keepdim=True)) / spread).flatten().tolist()
    for row, question in enumerate(batch.questions):
        prompt = render(trainer.processing_class, build_messages(question))
        advantage = round(advantages[row], 3) + 0.0
        rows.append((prompt, batch.completions[row], batch.tokens[row], advantage))
    return sorted(rows)


def learnt_rows(trainer: LoraGRPOTrainer) -> list[tuple]:
    """Return the same of each row that the update is given."""
    decode, rows = trainer.processing_class.decode, []
    for inputs in trainer._buffered_inputs:
        for row, advantage in enumerate(inputs["advantages"].tolist()):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            mask = inputs["completion_mask"][row].bool()
            completion = inputs["completion_ids"][row][mask]
            text = decode(completion, skip_special_tokens=True)
            rows.append((decode(prompt), text, int(mask.sum()), round(advantage, 3) + 0.0))
    return sorted(rows)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"shared_prefix": False}, {"num_iterations": 2, "save_steps": 2, "beta": 0.1}],
    ids=["packed", "TRL's own update", "two iterations with KL"],
)
def test_the_batch_ends_up_full_and_the_logs_show_what_is_learnt_from(
    tmp_path: Path, knobs: dict
) -> None:
    dead = {problem.question for problem in PROBLEMS[::2]}
    rewards, calls = rewarding(dead.__contains__)
    trainer = make_trainer(
        tmp_path,
        rewards=rewards,
        replacements=Replacements(ROWS, rounds=20, seed=0),
        **{"max_steps": 4, "max_completion_length": 12, **STEP, **knobs},
    )
    replaced = []

    def look() -> None:
        batch = trainer.step.batch
        assert len(batch.completions) == 16 and not any(dead_groups(batch.totals(), G))
        assert len(set(batch.questions)) == 4 and not dead & set(batch.questions)
        assert learnt_rows(trainer) == logged_rows(trainer)
        items = sum(inputs["completion_mask"].sum() for inputs in trainer._buffered_inputs)
        assert {int(b["num_items_in_batch"]) for b in trainer._buffered_inputs} == {int(items)}
        replaced.append(batch.dropped_completions)

    trainer.add_callback(AtEachStep(look))
    trainer.train()
    generations = 4 // knobs.get("num_iterations", 1)
    drawn = sum(len(call["question"]) for call in calls)
    assert drawn == 16 * generations + sum(replaced) // knobs.get("num_iterations", 1)
    assert len(replaced) == 4 and sum(replaced) > 0
    assert len({frozenset(call) for call in calls}) == 1, "each draw is paid by the same columns"
    assert all(len(set(call["question"])) == len(call["question"]) // G for call in calls)


def test_the_rounds_are_a_limit_and_training_goes_on(tmp_path: Path) -> None:
    rewards, calls = rewarding(lambda question: True)
    trainer = make_trainer(
        tmp_path,
        rewards=rewards,
        replacements=Replacements(ROWS, rounds=2, seed=0),
        **{"max_steps": 2, "max_completion_length": 12, **STEP},
    )
    trainer.train()
    assert [len(call["question"]) for call in calls] == [16, 16, 16] * 2
    drawn = [question for call in calls[3:] for question in call["question"]]
    assert len(set(drawn)) == 12, "no prompt is drawn twice in a step"
    assert trainer.step.batch.questions == drawn[:16]
    assert [row["grad_norm"] for row in trainer.state.log_history[:2]] == [0.0, 0.0]
    row = describe_step(trainer.step.batch, G, {})
    tokens = sum(len(ids) for call in calls[3:] for ids in call["completion_ids"])
    assert (row["drawn_groups"], row["frac_reward_zero_std"]) == (12, 1.0)
    assert row["dropped_tokens"] == tokens - sum(trainer.step.batch.tokens)


def test_without_the_flag_nothing_is_drawn_in_addition(tmp_path: Path) -> None:
    rewards, calls = rewarding(lambda question: True)
    trainer = make_trainer(tmp_path, rewards=rewards, max_completion_length=12)
    trainer.train()
    row = describe_step(trainer.step.batch, G, {})
    assert (len(calls), row["drawn_groups"], row["dropped_tokens"]) == (1, 4, 0)


def test_replacements_are_free_problems_and_the_same_for_the_same_step() -> None:
    replacements = Replacements(ROWS[:10], rounds=1, seed=3)
    taken = {row["question"] for row in ROWS[:4]}
    first = replacements.choose(3, taken, step=7, drawn=1)
    assert len({row["question"] for row in first} - taken) == 3
    assert first == replacements.choose(3, taken, step=7, drawn=1)
    others = [(8, 1, 3), (7, 2, 3), (7, 1, 4)]
    for step, drawn, seed in others:
        assert Replacements(ROWS[:10], 1, seed).choose(3, taken, step, drawn) != first
    assert len(replacements.choose(9, taken, 7, 1)) == 6
    assert replacements.choose(9, {row["question"] for row in ROWS}, 7, 1) == []


# With log-probs of a sampler


class RandomSampler:
    """Answers as vLLM's engine is asked to: ragged rows of random tokens and their log-probs."""

    def __init__(self) -> None:
        self.sampled: dict[tuple[int, ...], list[float]] = {}
        self.seeds: list[int] = []

    def sync(self, model: torch.nn.Module) -> None:
        self.synced = model

    def abort(self) -> None:
        raise AssertionError("nothing failed")

    def sample(self, prompts: list, seed: int, max_tokens: int, **_: Any) -> tuple[list, list]:
        draw = random.Random(seed)
        self.seeds.append(seed)
        sizes = [draw.randint(2, max_tokens) for _ in prompts]
        ids = [[draw.randrange(3, 90) for _ in range(size)] for size in sizes]
        logprobs = [[-9 * draw.random() for _ in row] for row in ids]
        self.sampled |= {tuple(row): values for row, values in zip(ids, logprobs, strict=True)}
        return ids, logprobs


def test_the_samplers_log_probs_stay_with_their_rows(tmp_path: Path, monkeypatch) -> None:
    outputs, whole = [], GRPOTrainer._generate_and_score_completions

    def keep(self: GRPOTrainer, inputs: list) -> dict[str, torch.Tensor]:
        outputs.append(whole(self, inputs))
        return outputs[-1]

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", keep)
    dead = {problem.question for problem in PROBLEMS[::2]}
    trainer = make_trainer(
        tmp_path,
        rewards=rewarding(dead.__contains__)[0],
        replacements=Replacements(ROWS, rounds=20, seed=0),
        **{"max_completion_length": 12, **STEP},
    )
    sampler = RandomSampler()
    sample_with_vllm(trainer, sampler)
    trainer.train()
    assert len(outputs) > 1 and len(set(sampler.seeds)) == len(outputs)
    for inputs in trainer._buffered_inputs:
        assert inputs["importance_sampling_ratio"].shape == inputs["completion_mask"].shape
        for row, mask in enumerate(inputs["completion_mask"].bool()):
            ids = tuple(inputs["completion_ids"][row][mask].tolist())
            found = inputs["sampling_per_token_logps"][row][mask]
            torch.testing.assert_close(found, torch.tensor(sampler.sampled[ids]))
    differences = [
        (part["old_per_token_logps"] - part["sampling_per_token_logps"]).abs()
        * part["completion_mask"]
        for part in outputs
    ]
    name = "sampling/sampling_logp_difference/max"
    largest = max(float(part.max()) for part in differences)
    assert trainer.state.log_history[0][name] == pytest.approx(largest)


# What is shown


def test_a_step_stays_one_line_and_shows_what_was_drawn(capsys) -> None:
    batch = batch_of([3] * 8, [float(row % G) for row in range(8)])
    batch.dropped_completions, batch.dropped_tokens = 12, 40
    measured = {"step": 1, "seconds": 1.0, "tokens_per_second_generate": 64.0}
    row = describe_step(batch, G, {}) | measured
    display = Display()
    display.step(row, batch, total=9, every=5)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "dead groups   0.0 % (5 groups drawn)     64 tok" in line
    batch.dropped_completions = 0
    display.step(row, batch, total=9, every=5)
    assert "drawn" not in capsys.readouterr().out
