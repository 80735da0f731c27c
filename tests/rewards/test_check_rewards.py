import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_grpo.cli import run
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.rewards.corpus import build_corpus, rank
from lora_grpo.tasks.numbers import same_number
from lora_grpo.tasks.task import NUMBER_TASK

Check = Callable[..., tuple[int, str]]
OWN_REWARDS = """
def any_number(completions, **columns):
    return [float(any(letter.isdigit() for letter in text)) for text in completions]
def quick(completions, **columns):
    return [float("<reasoning>\\n\\n</reasoning>" in text) for text in completions]
def brevity(completions, **columns):
    return [float(len(text) < 200) for text in completions]
def level(completions, difficulty, **columns):
    return [value / 9 for value in difficulty]
def correctness(completions, prompts, question, answer, **columns):
    return [1.0] * len(completions)
def broken(completions, **columns):
    return [1 / 0]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file of rewards of one's own."""
    path = tmp_path / "mine.py"
    path.write_text(OWN_REWARDS)
    return str(path)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command: its exit status, and all that it prints on one line."""

    def run_it(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["check_rewards.py", *flags])
        try:
            status = run("check-rewards")
        except SystemExit as ended:  # by tyro
            status = ended.code
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).replace("│", " ").split())

    return run_it


def write_rows(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_corpus_says_of_each_completion_what_it_is() -> None:
    corpus = build_corpus()
    names = [case.name for case in corpus]
    assert len(set(names)) == len(names) >= 50
    for case in corpus:
        correct = same_number(NUMBER_TASK.parse(case.completion) or "", case.answer)
        right = correct and NUMBER_TASK.has_format(case.completion)
        assert right == (case.standing in ("right", "loose")), case.name
        tagless = "72" in case.completion and "<" not in case.completion
        assert (case.standing == "tagless") == tagless


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_the_built_in_sets_rank_right_and_every_case_is_printed(
    check: Check, reward_set: str
) -> None:
    status, printed = check("--reward-set", reward_set)
    assert status == 0
    assert all(" ".join(case.name.split()) in printed for case in build_corpus())
    assert f"ranking: right ({len(build_corpus())} completions)" in printed


def test_what_ones_own_reward_changes_is_remarked_and_breaks_no_rule(
    check: Check, own: str
) -> None:
    """As the README has it: a reward for brevity pays a short flawed completion on purpose."""
    status, printed = check("--reward", f"{own}:brevity=0.5", "--reward", f"{own}:any_number=0.1")
    assert status == 0
    assert "ranking: right" in printed and "with your own rewards" in printed
    assert "'text before' gets 1.6" in printed
    ranking = rank(build_rewards(custom=(f"{own}:any_number=0.1",)), "default")
    assert "'no tags, sentence' gets 0.1, it must get nothing" in ranking.remarks
    ranking = rank(build_rewards("classic", (f"{own}:quick=0.5",)), "classic")
    assert ranking.remarks == ["'empty reasoning' gets 3.5, 'answered $1,200.00' only 3.5"]
    assert ranking.violations == []


def test_without_correctness_nothing_is_claimed(check: Check, own: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, {"question": "q", "answer": "many"})
    flags = ("--reward-set", "none", "--reward", f"{own}:any_number", "--dataset", rows)
    status, printed = check(*flags)
    assert status == 0
    assert "ranking: not checked" in printed and "gold answers: not checked" in printed


def test_a_correctness_of_ones_own_is_ranked_and_gets_the_prompt(check: Check, own: str) -> None:
    status, printed = check("--reward-set", "none", "--reward", f"{own}:correctness")
    assert status == 1 and "'empty' gets 1, 'perfect' only 1" in printed


def test_weights_count_and_a_wrong_ranking_is_status_1(check: Check) -> None:
    status, printed = check("--reward-weight", "format=-2")
    assert status == 1 and "x -2" in printed and "violations" in printed


def test_a_reward_that_needs_a_column_gets_a_row_of_the_dataset(
    check: Check, own: str, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path, {"question": "q", "answer": "1", "difficulty": 9})
    assert check("--reward", f"{own}:level", "--dataset", rows)[0] == 0
    status, printed = check("--reward", f"{own}:level")
    assert status == 2 and "'difficulty'" in printed


def test_gold_answers_go_through_the_reward(check: Check, tmp_path: Path) -> None:
    golds = ("72", "#### 1,200", "x + 1", "many")
    path = write_rows(tmp_path, *({"q": "How many?", "a": gold} for gold in golds))
    status, printed = check("--dataset", path, "--question-column", "q", "--answer-column", "a")
    assert status == 1
    assert f"gold answers: 2 of 4 score full marks ({path})" in printed
    assert "row 3: 'x + 1'" in printed and "row 4: 'many'" in printed
    path = write_rows(tmp_path, {"question": "How many?", "answer": "6 * 12 = 72\n#### 72"})
    status, printed = check("--dataset", path, "--reward-set", "classic")
    assert status == 0 and "gold answers: 1 of 1" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward-set", "none"], "--reward-set none leaves no reward"),
        (["--reward-set", "best"], "invalid choice"),
        (["--question-column", "q"], "need --dataset FILE"),
        (["--reward-weight", "format"], "name=0.5, got 'format'"),
        (["--reward-weight", "form=1"], "error: --reward-weight must name one of correctness"),
        (["--reward", "gone.py:mine"], "error: --reward gone.py does not exist"),
        (["--dataset", "gone.jsonl"], "error: --dataset gone.jsonl does not exist"),
        (["--reward", "FILE:broken"], "error: reward 'broken' raised ZeroDivisionError"),
    ],
)
def test_bad_input_is_status_2(check: Check, own: str, flags: list[str], message: str) -> None:
    status, printed = check(*(flag.replace("FILE", own) for flag in flags))
    assert status == 2 and message in printed
