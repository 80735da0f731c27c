"""The benchmark: both sides do the same work, and the report is right about what they took."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.dev.benchmark import BenchmarkConfig, key, list_specs, measure, read_results, run
from lora_grpo.dev.benchmark_cases import PEFT, PROJECT, PROVEN, TRL, Case, find_cases
from lora_grpo.dev.benchmark_report import build_tables, draw, summarise
from lora_grpo.dev.benchmark_worker import signal_reward

ROOT = Path(__file__).parents[2]
ALL = find_cases(("all",), "a", "b", "c")
SMALL = Case(
    "small",
    "two steps of the embedded model",
    (
        *("--preset", "tiny", "--num-generations", "4", "--per-device-train-batch-size", "4"),
        *("--gradient-accumulation-steps", "2", "--max-completion-length", "16"),
        *("--no-load-in-4bit",),
    ),
    signal="half of the groups",
    lengths=(20, 7),
)


def spec_of(case: Case, side: str) -> dict[str, Any]:
    config = BenchmarkConfig(steps=2, warmup_steps=1, rounds=1)
    return next(spec for spec in list_specs(config, [case]) if spec["side"] == side)


def test_both_sides_do_the_same_work_and_the_phases_fill_the_step(tmp_path: Path) -> None:
    mine, theirs = (measure(spec_of(SMALL, side), tmp_path) for side in (PROJECT, TRL))
    for found in (mine, theirs):
        assert len(found["rows"]) == 2 and found["micro_batches"] == [4, 2]
        assert found["peak_bytes"] > 200e6
        for row in found["rows"]:
            phases = row["generate"] + row["reward"] + row["update"] + row["other"]
            assert phases == pytest.approx(row["seconds"])
            assert 0 < row["update"] < row["seconds"] and row["tokens"] == 8 * 7
    assert len(mine["grad_norms"]) == 3 and min(mine["grad_norms"]) > 0
    assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)


def test_a_failed_side_says_why(tmp_path: Path) -> None:
    case = replace(SMALL, flags=("--model", str(tmp_path / "nowhere"), "--no-load-in-4bit"))
    with pytest.raises(RuntimeError, match="nowhere is neither a local folder"):
        measure(spec_of(case, PROJECT), tmp_path)


def test_rewards_leave_a_signal_in_the_groups_that_the_case_names() -> None:
    completions = [f"text {index}" for index in range(32)]
    for every, live in ((0, [True] * 4), (2, [True, False, True, False])):
        rewards = signal_reward(every)(completions, num_generations=8)
        groups = [rewards[start : start + 8] for start in range(0, 32, 8)]
        assert [len(set(group)) > 1 for group in groups] == live


def test_sides_take_turns_and_each_round_has_its_seed() -> None:
    specs = list_specs(BenchmarkConfig(rounds=2), [ALL[0]])
    assert [(spec["side"], spec["seed"]) for spec in specs] == [
        *((PROJECT, 0), (TRL, 0)),
        *((TRL, 1), (PROJECT, 1)),
    ]
    merge = next(case for case in ALL if case.kind == "merge")
    assert merge.sides == (PROJECT, PEFT, PROVEN)
    assert len({key(spec) for spec in list_specs(BenchmarkConfig(rounds=3), ALL)}) == 3 * (
        2 * len(ALL) + 1
    )


def test_each_quantity_doubles_alone() -> None:
    scaling = [case for case in ALL if case.name.startswith("scaling")]
    sizes = {case.name: (case.flags, case.lengths) for case in scaling}
    flags, lengths = sizes["scaling-g4-p128-t64"]
    assert lengths == (128, 64) and flags[flags.index("--num-generations") + 1] == "4"
    assert sizes["scaling-g4-p256-t64"][1] == (256, 64)
    assert sizes["scaling-g4-p128-t128"][1] == (128, 128)
    assert sizes["scaling-g8-p128-t64"][0][flags.index("--num-generations") + 1] == "8"


def made_up(case: Case, side: str, seconds: list[float], peak: float) -> dict[str, Any]:
    rows = [
        {"seconds": s, "generate": s / 2, "reward": 0.0, "update": s / 4, "other": s / 4}
        | {"tokens": 100}
        for s in seconds
    ]
    return {"case": case.record(), "side": side, "rows": rows, "peak_bytes": peak}


def test_medians_spreads_ratios_and_targets() -> None:
    case = next(case for case in ALL if case.name == "smollm2")
    runs = [
        made_up(case, PROJECT, [1.0, 2.0], 1e9),
        made_up(case, TRL, [4.0, 10.0], 3e9),
        made_up(case, TRL, [5.0, 6.0], 4e9),
        made_up(case, PROJECT, [4.0, 30.0], 2e9),
    ]
    (found,) = summarise(runs)
    mine, theirs = found["sides"][PROJECT], found["sides"][TRL]
    assert (mine["seconds"], mine["least"], mine["most"], mine["count"]) == (3.0, 1.0, 30.0, 4)
    assert theirs["seconds"] == 5.5 and theirs["peak_bytes"] == 3.5e9
    assert found["ratios"] == {"seconds": 3.0 / 5.5, "peak_bytes": 1.5 / 3.5}
    text = build_tables([found])
    assert "| 3.00 (1.00 to 30.0, n 4) | 1.50 | 0.75 | 0.75 |" in text
    lines = [line for line in text.splitlines() if "| time |" in line or "peak memory |" in line]
    assert lines[0].endswith("| 0.55 | 0.5 | missed |")
    assert lines[1].endswith("| 0.43 | 0.5 | met |")


def test_a_run_that_learns_counts_all_of_its_steps() -> None:
    case = next(case for case in ALL if case.kind == "learning")
    runs = [
        {**made_up(case, PROJECT, [1.0, 2.0, 3.0], 1e9), "accuracies": [0.5, 0.91]},
        {**made_up(case, TRL, [4.0] * 5, 1e9), "accuracies": [0.95]},
    ]
    (found,) = summarise(runs)
    assert found["ratios"]["seconds"] == 6 / 20 and found["sides"][TRL]["steps"] == [5]


def test_the_picture_holds_every_case(tmp_path: Path) -> None:
    chosen = [case for case in ALL if case.kind == "steps"]
    runs = [made_up(case, side, [1.0], 1e9) for case in chosen for side in case.sides]
    draw(summarise(runs), tmp_path / "all.png")
    few = [run for run in runs if run["case"]["name"] == "embedded"]
    draw(summarise(few), tmp_path / "few.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "few.png").stat().st_size > 5000


def test_what_is_measured_is_kept_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    config = BenchmarkConfig(rounds=1, json=path)
    results = read_results(path)
    for spec in list_specs(config, find_cases(("embedded",), "a", "b", "c")):
        case = Case(**{**spec["case"], "flags": tuple(spec["case"]["flags"])})
        results["runs"].append({**made_up(case, spec["side"], [1.0], 1e9), **spec})
    path.write_text(json.dumps(results))
    before = path.read_bytes()
    run(config)
    assert "| embedded model, 16 x 8 x 64 | time | 1.00 |" in capsys.readouterr().out
    assert path.read_bytes() == before
    results["machine"]["processor"] = "another"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="was measured on another machine"):
        run(config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--json", "no/where.json"], "there is no folder no"),
        (["--smollm2", "."], "has no config.json"),
        (["smollm3"], "smollm3"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/benchmark.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert said in done.stderr + done.stdout and "Traceback" not in done.stderr
