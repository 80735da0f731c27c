"""What report.html holds: a run's data, how much of it, its verdict, and where it is written."""

import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
from report_runs import RIGHT, WRONG, page_data, write_run

from lora_grpo.cli import run
from lora_grpo.machine.files import append_jsonl
from lora_grpo.report.gather import advantages, encode
from lora_grpo.report.page import write_report

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>window.hacked = 1</script><!-- & \u2028 \ud800"


def write(run_dir: Path, **more: list[str]) -> dict:
    write_report([run_dir], run_dir / "report.html", **more)
    return page_data(run_dir / "report.html")["runs"][0]


def test_the_page_holds_the_records_of_a_run(tmp_path: Path) -> None:
    found = write(write_run(tmp_path / "run"))
    assert (found["name"], found["step"], found["steps"], found["kept_step"]) == ("run", 6, 6, 6)
    assert found["minutes"] == 0.6 and found["peak_memory_bytes"] == 2**30
    assert found["metrics"]["step"] == [1, 2, 3, 4, 5, 6]
    assert found["metrics"]["rewards/correctness"][5] == 0.05
    assert found["validation"]["strict_accuracy"] == [0.75]
    assert [group["step"] for group in found["groups"]] == [2, 4, 6]
    group = found["groups"][0]["completions"]
    assert [one["text"] for one in group] == [RIGHT, WRONG, "<answer>2</answer>", WRONG]
    assert [one["right"] for one in group] == [True, False, True, False]
    assert [one["format"] for one in group] == [True, False, False, False]
    assert [one["reward"] for one in group] == [1.2, 0.0, 1.0, 0.0]
    assert [item["change"] for item in found["items"]] == ["gained"] * 7 + ["both right"]
    assert found["notes"] == []


def test_changed_answers_come_first(tmp_path: Path) -> None:
    found = write(write_run(tmp_path / "run", gained=1, lost=2, items=5))
    changes = [item["change"] for item in found["items"]]
    assert changes == ["gained", "lost", "lost", "both right", "both right"]


def test_a_step_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", evaluated=False)
    row = json.loads((run_dir / "completions.jsonl").read_text().splitlines()[0])
    append_jsonl(run_dir / "completions.jsonl", [row | {"step": 8}] * 3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    found = write(run_dir)
    assert found["step"] == 6 and {group["step"] for group in found["groups"]} == {2, 4, 6}


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale_rewards: str) -> None:
    """By the formula of GRPOTrainer, whose standard deviation has Bessel's correction."""
    rewards = [1.2, 0.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    grouped = torch.tensor(rewards).view(2, 4)
    expected = grouped - grouped.mean(1, keepdim=True)
    spread = {"group": grouped.std(1, keepdim=True), "batch": grouped.std()}
    if scale_rewards in spread:
        expected = expected / (spread[scale_rewards] + 1e-4)
    found = torch.tensor(advantages(rewards, 4, scale_rewards)).float()
    torch.testing.assert_close(found, expected)


def test_a_completion_that_no_reward_applied_to_has_no_advantage() -> None:
    found = advantages([1.0, None, 0.0, None, None, None], 3, "group")
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert found.flatten().tolist() == pytest.approx([expected, 0, -expected, 0, 0, 0])


def test_a_long_run_with_megabytes_of_completions_stays_under_5_mb(tmp_path: Path) -> None:
    texts = (RIGHT * 20_000, WRONG * 3000, *["<" * 2**13] * 2)
    run_dir = write_run(tmp_path / "run", steps=250, every=10, texts=texts, items=1319, gained=700)
    found = write(run_dir)
    assert (run_dir / "report.html").stat().st_size < 5_000_000
    steps = [group["step"] for group in found["groups"]]
    assert steps[0] == 10 and 10 < len(steps) < 25
    assert set(range(210, 251, 10)) <= set(steps)  # the newest ones are all there
    assert found["groups"][-1]["completions"][0]["text"].startswith(RIGHT * 4)
    assert len(found["metrics"]["step"]) == 250
    said = " ".join(found["notes"])
    assert "of 25 groups of completions" in said and "of 1,319 test problems" in said
    assert "texts of more than 16,384 characters are cut" in said


def test_one_megabyte_of_text_is_kept_whole(tmp_path: Path) -> None:
    text = "a" * 2**20
    found = write(write_run(tmp_path / "run", steps=2, texts=(text, *[WRONG] * 3), evaluated=False))
    assert found["groups"][0]["completions"][0]["text"] == text and found["notes"] == []


def test_many_steps_are_one_point_of_several(tmp_path: Path) -> None:
    found = write(write_run(tmp_path / "run", steps=2500, every=500, evaluated=False))
    steps = found["metrics"]["step"]
    assert len(steps) <= 1000 and steps[-1] == 2500
    assert "the curves show one of 3 steps" in found["notes"]


def test_the_wheel_holds_what_a_page_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = project["package-data"]["lora_grpo"]
    held = {path for pattern in patterns for path in (ROOT / "lora_grpo").glob(pattern)}
    room = {path for path in (ROOT / "lora_grpo/report").rglob("*.*") if path.is_file()}
    assert {path for path in room if path.suffix not in (".py", ".pyc")} <= held


def test_data_is_inert_ascii() -> None:
    value = [HOSTILE, math.nan, -math.inf, 1.5]
    text = encode(value)
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == [HOSTILE, None, None, 1.5]


@pytest.mark.parametrize(
    ("changed", "outcome", "following"),
    [
        ({"gained": 7, "items": 8}, "It learnt: strict accuracy went from 12.5 %", "merge"),
        ({"gained": 0, "lost": 7, "items": 8}, "It got worse", "--learning-rate"),
        ({"gained": 3, "items": 8}, "Not shown to have learnt", "--max-steps 12"),
        ({"evaluated": False}, "at step 6 of 6: the mean reward is 0.040", "--resume"),
        ({"evaluated": False, "steps": 0}, "no step is recorded", "--resume"),
    ],
)
def test_the_verdict_is_two_sentences(
    changed: dict, outcome: str, following: str, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", **changed)
    first, second = write(run_dir)["verdict"]
    assert outcome in first and following in second
    if "evaluated" not in changed:
        assert "McNemar's p = " in first and "on the same 8 problems" in first
    assert write(run_dir, findings=["Raise --num-generations."])["verdict"][1] == (
        "Raise --num-generations."
    )


def report(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
    return run("report")


def test_the_command_writes_beside_the_adapter_or_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (write_run(Path(f"adapters/{name}")) for name in ("one", "two"))
    for _ in range(2):  # an earlier report is overwritten
        assert report(monkeypatch, one) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report: adapters/one/report.html"
    assert report(monkeypatch, one, two) == 0
    assert [run["name"] for run in page_data(Path("report.html"))["runs"]] == ["one", "two"]
    assert report(monkeypatch, one, two, "--output", "new/both.html") == 0
    assert Path("new/both.html").is_file()
    assert list(tmp_path.rglob(".staged*")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adapters/none"], "adapters/none does not exist"),
        (["adapters/run", "adapters/run/last"], "report.py adapters/run"),
        (["adapters"], "neither an adapter nor a model"),
        (["adapters/run", "--output", "notes.html"], "--output notes.html exists"),
        ([], "adapters/tiny"),
    ],
)
def test_the_command_refuses_what_is_no_run_and_other_peoples_files(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (write_run(Path("adapters/run")) / "last").mkdir()
    Path("notes.html").write_text("<p>mine")
    try:
        status = report(monkeypatch, *arguments)
    except SystemExit as end:  # tyro's
        status = end.code
    printed = capsys.readouterr()
    assert status == 2 and said in " ".join((printed.out + printed.err).replace("│", " ").split())
    assert Path("notes.html").read_text() == "<p>mine"
    assert not list(tmp_path.rglob("report.html"))
