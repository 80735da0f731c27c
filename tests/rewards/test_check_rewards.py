import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_grpo.data.numbers import same_number
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.rewards.check import CheckRewardsConfig, check_rewards
from lora_grpo.rewards.corpus import build_corpus, rank

ROOT = Path(__file__).parents[2]
PAYS_ANY_NUMBER = """
def any_number(completions, **columns):
    return [float(any(letter.isdigit() for letter in text)) for text in completions]
"""
PAYS_NO_REASONING = """
def quick(completions, **columns):
    return [float("<reasoning>\\n\\n</reasoning>" in text) for text in completions]
"""


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/check_rewards.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_corpus_says_of_each_completion_what_it_is() -> None:
    corpus = build_corpus()
    names = [case.name for case in corpus]
    assert len(set(names)) == len(names) >= 50
    for case in corpus:
        correct = same_number(NUMBER_TASK.parse(case.completion) or "", case.answer)
        right = correct and NUMBER_TASK.has_format(case.completion)
        assert right == (case.standing in ("right", "loose")), case.name
        assert (case.standing == "tagless") == (
            "72" in case.completion and "<" not in case.completion
        )


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_the_built_in_sets_rank_right(reward_set: str) -> None:
    ranking = rank(build_rewards(reward_set), reward_set)
    assert ranking.rules and ranking.violations == []


def test_a_reward_for_tagless_numbers_is_remarked(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", PAYS_ANY_NUMBER)
    ranking = rank(build_rewards(custom=(f"{path}:any_number=0.1",)), "default")
    assert "'no tags, sentence' gets 0.1, it must get nothing" in ranking.remarks
    assert not ranking.violations


def test_a_reward_for_a_flaw_is_remarked(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", PAYS_NO_REASONING)
    ranking = rank(build_rewards("classic", (f"{path}:quick=0.5",)), "classic")
    assert ranking.remarks == ["'empty reasoning' gets 3.5, 'answered $1,200.00' only 3.5"]


def test_without_correctness_no_ranking_is_claimed(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", PAYS_ANY_NUMBER)
    check = check_rewards(CheckRewardsConfig(reward_set="none", reward=(f"{path}:any_number",)))
    assert check.ranking.rules == [] and check.passed


def test_a_custom_correctness_is_ranked_and_gets_the_prompt(tmp_path: Path) -> None:
    text = "def correctness(completions, prompts, question, answer, **columns): return [1.0] * 1"
    path = write(tmp_path / "mine.py", text)
    check = check_rewards(CheckRewardsConfig(reward_set="none", reward=(f"{path}:correctness",)))
    assert "'empty' gets 1, 'perfect' only 1" in check.ranking.violations


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_script_prints_every_case_and_exits_0(reward_set: str) -> None:
    done = run_script("--reward-set", reward_set)
    assert (done.returncode, done.stderr) == (0, "")
    for case in build_corpus():
        assert case.name in done.stdout
    assert "rule checked: every correct" in done.stdout
    assert f"ranking: right ({len(build_corpus())} completions)" in done.stdout


def test_what_ones_own_reward_changes_is_shown_and_breaks_no_rule(tmp_path: Path) -> None:
    """As the README has it: a reward for brevity pays a short flawed completion on purpose."""
    text = "def brevity(completions, **columns): return [float(len(c) < 200) for c in completions]"
    path = write(tmp_path / "mine.py", text)
    done = run_script("--reward", f"{path}:brevity=0.5")
    assert done.returncode == 0
    assert "ranking: right" in done.stdout and "with your own rewards" in done.stdout
    assert "'text before' gets 1.5" in done.stdout


def test_script_exits_1_for_a_wrong_ranking() -> None:
    done = run_script("--reward-weight", "format=-2")
    assert done.returncode == 1 and "violations" in done.stdout


def test_a_reward_that_needs_a_column_gets_a_row_of_the_dataset(tmp_path: Path) -> None:
    text = "def level(completions, difficulty, **columns): return [d / 9 for d in difficulty]"
    path = write(tmp_path / "mine.py", text)
    rows = write(tmp_path / "rows.jsonl", '{"question": "q", "answer": "1", "difficulty": 9}')
    assert run_script("--reward", f"{path}:level", "--dataset", rows).returncode == 0
    without = run_script("--reward", f"{path}:level")
    assert without.returncode == 2 and "'difficulty'" in without.stderr


def test_script_takes_weights_and_several_rewards(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", PAYS_ANY_NUMBER + PAYS_NO_REASONING)
    done = run_script(
        *("--reward", f"{path}:any_number=0.5", "--reward", f"{path}:quick=0.1"),
        *("--reward-weight", "any_number=0", "--reward-weight", "format=0.3"),
    )
    assert done.returncode == 0
    assert "x 0.3" in done.stdout and "x 0.1" in done.stdout


def test_script_runs_gold_answers_through_the_reward(tmp_path: Path) -> None:
    rows = [{"q": "How many?", "a": answer} for answer in ("72", "#### 1,200", "x + 1", "many")]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    flags = ("--dataset", path, "--question-column", "q", "--answer-column", "a")
    done = run_script(*flags)
    assert done.returncode == 1
    assert f"gold answers: 2 of 4 score full marks ({path})" in done.stdout
    assert "row 3: 'x + 1'" in done.stdout and "row 4: 'many'" in done.stdout


def test_script_passes_a_good_dataset(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "6 * 12 = 72\n#### 72"}]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    done = run_script("--dataset", path, "--reward-set", "classic")
    assert done.returncode == 0
    assert "gold answers: 1 of 1 score full marks" in done.stdout


def test_script_says_when_gold_answers_were_not_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", PAYS_ANY_NUMBER)
    rows = write(tmp_path / "rows.jsonl", '{"question": "q", "answer": "many"}')
    done = run_script("--reward-set", "none", "--reward", f"{path}:any_number", "--dataset", rows)
    assert done.returncode == 0
    assert "ranking: not checked, the rewards include no `correctness`" in done.stdout
    assert "gold answers: not checked" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward-set", "none"], "--reward-set none leaves no reward"),
        (["--reward-set", "best"], "invalid choice"),
        (["--question-column", "q"], "need --dataset FILE"),
        (["--reward-weight", "format"], "must look like name=0.5, got 'format'"),
        (["--reward-weight", "form=1"], "error: --reward-weight must name one of correctness"),
        (["--reward", "gone.py:mine"], "error: --reward gone.py does not exist"),
        (["--dataset", "gone.jsonl"], "error: --dataset gone.jsonl does not exist"),
        (["--reward", "FILE:mine"], "error: reward 'mine' raised ZeroDivisionError"),
    ],
)
def test_script_exits_2_for_bad_input(flags: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", "def mine(completions, **columns): return [1 / 0]")
    done = run_script(*(flag.replace("FILE", path) for flag in flags))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_script_needs_no_torch() -> None:
    program = (
        "import sys, lora_grpo.rewards.check\n"
        "print([name for name in ('torch', 'transformers', 'trl') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
    help_text = run_script("--help")
    assert help_text.returncode == 0 and "--reward-weight" in help_text.stdout
