"""The benchmark: both sides do the same work, and the tables are right about what they took."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.dev import benchmark
from lora_grpo.dev.benchmark import (
    PEFT,
    PROJECT,
    PROVEN,
    TRL,
    BenchmarkConfig,
    Case,
    build_tables,
    find_cases,
    list_specs,
    measure,
    run_benchmark,
)
from lora_grpo.dev.benchmark_worker import build_reward, run_steps

SMALL = Case(
    "two steps of the embedded model",
    (
        *("--preset", "tiny", "--num-generations", "4", "--per-device-train-batch-size", "4"),
        *("--gradient-accumulation-steps", "2", "--max-completion-length", "16"),
        *("--no-load-in-4bit",),
    ),
    signal="half of the groups",
    lengths=(20, 7),
)
ALL = {case.title: case for case in find_cases(BenchmarkConfig(("all",)))}


def spec_of(case: Case, side: str, seed: int = 0) -> dict[str, Any]:
    recorded = json.loads(json.dumps(asdict(case)))
    return {"case": recorded, "side": side, "seed": seed, "steps": 2, "warmup_steps": 1}


def test_both_sides_do_the_same_work_and_the_phases_fill_the_step() -> None:
    mine, theirs = (run_steps(spec_of(SMALL, side)) for side in (PROJECT, TRL))
    for found in (mine, theirs):
        assert len(found["rows"]) == 2
        assert found["peak_bytes"] > 200e6
        for row in found["rows"]:
            phases = row["generate"] + row["update"] + row["other"]
            assert phases == pytest.approx(row["seconds"])
            assert 0 < row["update"] < row["seconds"] and row["tokens"] == 8 * 7
    assert len(mine["grad_norms"]) == 3 and min(mine["grad_norms"]) > 0
    assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)


def test_a_side_that_fails_in_its_process_says_why(tmp_path: Path) -> None:
    case = replace(SMALL, flags=("--model", "tiny", "--r", "0"))
    with pytest.raises(RuntimeError, match="--r must be"):
        measure(spec_of(case, PROJECT), tmp_path)


@pytest.mark.parametrize(("every", "live"), [(1, [True] * 4), (2, [True, False, True, False])])
def test_rewards_differ_in_the_groups_that_the_case_names(every: int, live: list[bool]) -> None:
    rewards = build_reward(every, 8)([f"text {index}" for index in range(32)])
    groups = [rewards[start : start + 8] for start in range(0, 32, 8)]
    assert [len(set(group)) > 1 for group in groups] == live


def test_sides_take_turns_and_each_round_has_its_seed() -> None:
    specs = list_specs(BenchmarkConfig(rounds=2))
    assert [(spec["side"], spec["seed"]) for spec in specs] == [
        *((PROJECT, 0), (TRL, 0)),
        *((TRL, 1), (PROJECT, 1)),
    ]
    sides = [spec["side"] for spec in list_specs(BenchmarkConfig(("merge",), rounds=1))]
    assert sides == [PROJECT, PEFT, PROVEN]


def made_up(title: str, side: str, seconds: list[float], peak: float, **more) -> dict[str, Any]:
    rows = [
        {"seconds": s, "generate": s / 2, "update": s / 4, "other": s / 4, "tokens": 100}
        for s in seconds
    ]
    case = json.loads(json.dumps(asdict(ALL[title])))
    return {"case": case, "side": side, "rows": rows, "peak_bytes": peak, **more}


def cells(table: str, *begins: str) -> list[str]:
    """Return the rest of the one line of a table that begins with these cells."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    (line,) = [line for line in lines if tuple(line[: len(begins)]) == begins]
    return line[len(begins) :]


def test_medians_spreads_ratios_and_targets() -> None:
    title = "SmolLM2-135M on GSM8K, 4 x 8 x 96"
    table = build_tables(
        [
            made_up(title, PROJECT, [1.0, 2.0], 1e9),
            made_up(title, TRL, [4.0, 10.0], 3e9),
            made_up(title, TRL, [5.0, 6.0], 4e9),
            made_up(title, PROJECT, [4.0, 30.0], 2e9),
        ]
    )
    mine = ["3.00 (1.00 to 30.0, n 4)", "1.50", "0.75", "0.75", "38", "1.50"]
    assert cells(table, title, PROJECT) == mine
    assert cells(table, title, TRL)[0] == "5.50 (4.00 to 10.0, n 4)"
    assert cells(table, title, "time") == [f"{3 / 5.5:.2f}", "0.5", "missed"]
    assert cells(table, title, "peak memory") == [f"{1.5 / 3.5:.2f}", "0.5", "met"]


def test_a_run_that_learns_counts_all_of_its_steps() -> None:
    title = next(title for title, case in ALL.items() if case.kind == "learning")
    runs = [made_up(title, PROJECT, [1.0, 2.0, 3.0], 1e9), made_up(title, TRL, [4.0] * 5, 1e9)]
    table = build_tables(runs)
    assert cells(table, title, "time")[0] == "0.30"
    assert cells(table, title, TRL)[0] == "20.0 (20.0 to 20.0, n 1; 5 steps)"


def test_what_is_measured_is_kept_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    config, title = BenchmarkConfig(rounds=1, json=path), "embedded model, 16 x 8 x 64"
    asked = []

    def measured(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
        asked.append(spec["side"])
        return made_up(title, spec["side"], [1.0], 1e9)

    monkeypatch.setattr(benchmark, "measure", measured)
    for _ in range(2):
        run_benchmark(config)
    assert asked == [PROJECT, TRL]
    assert cells(capsys.readouterr().out.rpartition("ratio of")[2], title, "time")[0] == "1.00"
    results = json.loads(path.read_text())
    results["machine"]["processor"] = "another"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="another machine"):
        run_benchmark(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"json": Path("no/where.json")}, "--json no/where.json: there is no folder no"),
        ({"smollm2": "."}, "--smollm2 . has no config.json"),
    ],
)
def test_bad_input_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BenchmarkConfig(**given)
