"""The benchmark: both sides do the same work, and the tables are right about what they took."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.dev import benchmark
from lora_grpo.dev.benchmark import PROJECT, TRL, BenchmarkConfig, Run
from lora_grpo.dev.benchmark_worker import build_reward, run_steps

FLAGS = "--preset tiny --no-load-in-4bit --num-generations 4 --per-device-train-batch-size 4"
FLAGS += " --gradient-accumulation-steps 2 --max-completion-length 16"
SMALL = Run("small", FLAGS.split(), one_live_in=2, lengths=[20, 7], steps=2, warmup_steps=1)


def test_both_sides_do_the_same_work_and_the_phases_fill_the_step() -> None:
    mine, theirs = (run_steps(replace(SMALL, side=side)) for side in (PROJECT, TRL))
    for found in (mine, theirs):
        assert len(found["rows"]) == 2
        assert found["peak_bytes"] > 200e6
        for row in found["rows"]:
            assert row["generate"] + row["update"] == pytest.approx(row["seconds"])
            assert 0 < row["generate"] < row["seconds"] and row["tokens"] == 8 * 7
    assert len(mine["grad_norms"]) == 3 and min(mine["grad_norms"]) > 0
    assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)


def test_a_side_that_fails_in_its_process_says_why(tmp_path: Path) -> None:
    wrong = replace(SMALL, flags=["--model", "tiny", "--r", "0"], side=PROJECT)
    with pytest.raises(RuntimeError, match="--r must be"):
        benchmark.measure(wrong, tmp_path)


@pytest.mark.parametrize(("one_in", "live"), [(1, [True] * 4), (2, [True, False, True, False])])
def test_rewards_differ_in_the_groups_that_the_case_names(one_in: int, live: list[bool]) -> None:
    rewards = build_reward(one_in, 8)([f"text {index}" for index in range(32)])
    groups = [rewards[start : start + 8] for start in range(0, 32, 8)]
    assert [len(set(group)) > 1 for group in groups] == live


def test_sides_take_turns_and_each_round_has_its_seed() -> None:
    runs = benchmark.list_runs(BenchmarkConfig(rounds=2))
    turns = [(run.side, run.seed) for run in runs]
    assert turns == [(PROJECT, 0), (TRL, 0), (TRL, 1), (PROJECT, 1)]


def made_up(side: str, seconds: list[float], peak: float) -> dict[str, Any]:
    rows = [{"seconds": s, "generate": s / 2, "update": s / 4, "tokens": 100} for s in seconds]
    return {**asdict(replace(SMALL, side=side)), "rows": rows, "peak_bytes": peak}


def cells(table: str, *begins: str) -> list[str]:
    """Return the rest of the one line of a table that begins with these cells."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    (line,) = [line for line in lines if tuple(line[: len(begins)]) == begins]
    return line[len(begins) :]


def test_medians_spreads_and_ratios() -> None:
    table = benchmark.build_tables(
        [
            made_up(PROJECT, [1.0, 2.0], 1e9),
            made_up(TRL, [4.0, 10.0], 3e9),
            made_up(TRL, [5.0, 6.0], 4e9),
            made_up(PROJECT, [4.0, 30.0], 2e9),
        ]
    )
    mine = ["3.00 (1.00 to 30.0, n 4)", "1.50", "0.75", "38", "1.50"]
    assert cells(table, "small", PROJECT) == mine
    times, ratios = table.split("\n\n")
    assert cells(times, "small", TRL)[0] == "5.50 (4.00 to 10.0, n 4)"
    assert cells(ratios, "small", TRL) == [f"{3 / 5.5:.2f}", f"{1.5 / 3.5:.2f}"]


def test_what_is_measured_is_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "results.json", []
    config = BenchmarkConfig(rounds=1, json=path)

    def measured(run: Run, folder: Path) -> dict[str, Any]:
        asked.append(run.side)
        return {"rows": [{"seconds": 1.0}], "peak_bytes": 1e9}

    monkeypatch.setattr(benchmark, "measure", measured)
    for _ in range(2):
        benchmark.run_benchmark(config)
    assert asked == [PROJECT, TRL]
    results = json.loads(path.read_text())
    results["machine"]["processor"] = "another"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="another machine"):
        benchmark.run_benchmark(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"json": Path("no/where.json")}, "--json no/where.json"),
    ],
)
def test_bad_input_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BenchmarkConfig(**given)
