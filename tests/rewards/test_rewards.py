import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_grpo.data.problems import load_problems
from lora_grpo.rewards.builtin import (
    build_rewards,
    check_gold,
    find_unpaid,
    parse_reward_weights,
    score,
    score_with,
)
from lora_grpo.rewards.calls import RewardError
from lora_grpo.tasks.numbers import last_number, same_number
from lora_grpo.tasks.task import NUMBER_TASK

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

PERFECT = "<reasoning>\n48 / 2 = 24\n48 + 24 = 72\n</reasoning>\n<answer>\n72\n</answer>"
NO_REASONING = "<reasoning>\n</reasoning>\n<answer>\n72\n</answer>"
GSM8K = Path(__file__).parents[2].parent / "shared" / "gsm8k"

PIECES = [*NUMBER_TASK.tags, "\n", " ", "x", "7", "72", "-", "$", ",", ".", "/", "%"]
completions = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
white_space = st.text(" \t\n\r", max_size=5)


def write_rewards(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


# Scores


def test_default_scores() -> None:
    assert score(PERFECT, "72") == {
        "correctness": 1.0,
        "format": 0.2,
        "length_penalty": 0.0,
        "total": 1.2,
    }
    assert score(PERFECT, "73")["total"] == 0.2
    assert score("<answer>72</answer>", "72")["total"] == 1.0
    assert score("The answer is 72", "72")["total"] == 0.0


def test_classic_scores() -> None:
    assert score(PERFECT, "72", "classic") == {
        "correctness": 2.0,
        "integer": 0.5,
        "strict_format": 0.5,
        "soft_format": 0.5,
        "xml_count": 0.5,
        "total": 4.0,
    }
    assert score(NO_REASONING, "72", "classic")["total"] == 3.0
    assert score(PERFECT, "73", "classic")["total"] == 2.0
    assert score(PERFECT, "$72", "classic")["total"] == 4.0
    assert score("72", "72", "classic")["total"] == 0.0


def test_classic_neither_punishes_length_nor_trailing_text_by_its_length() -> None:
    long = PERFECT.replace("48 / 2", "Think. " * 10_000 + "48 / 2")
    assert score(long, "72", "classic")["total"] == 4.0
    short, endless = (score(PERFECT + "\nx" * n, "72", "classic")["total"] for n in (1, 5_000))
    assert short == endless < 4.0


@pytest.mark.parametrize(
    ("answer", "paid"),
    [
        *[("72", 0.5), ("-72", 0.5), ("1,200", 0.5), ("$72", 0.5)],
        *[("72.0", 0), ("72 clips", 0), ("1,20", 0), ("", 0), ("\u0667\u0662", 0), ("1/2", 0)],
    ],
)
def test_classic_integer(answer: str, paid: float) -> None:
    completion = PERFECT.replace("\n72\n<", f"\n{answer}\n<")
    assert score(completion, "72", "classic")["integer"] == paid


def test_classic_counts_each_tag_with_its_line_breaks_once() -> None:
    def count(completion: str) -> float:
        return score(completion, "72", "classic")["xml_count"]

    assert count("<reasoning>\nx") == 0.125
    assert count("<reasoning>\nx\n</reasoning>\nso") == 0.25
    assert count("<reasoning>\nx\n</reasoning>\n<answer>\n72") == 0.375
    assert count("<reasoning>x</reasoning><answer>72</answer>") == 0.0
    assert count(PERFECT + "\n" + PERFECT) == 0.0


@pytest.mark.parametrize("reward_set", ["default", "classic"])
@given(completion=completions, answer=st.text())
def test_scores_are_bounded_and_sum_to_their_total(
    reward_set: str, completion: str, answer: str
) -> None:
    scores = score(completion, answer, reward_set)
    rewards = build_rewards(reward_set)
    assert list(scores) == [*(reward.name for reward in rewards), "total"]
    assert all(0 <= scores[reward.name] <= reward.weight for reward in rewards)
    assert scores["total"] == pytest.approx(sum(scores[reward.name] for reward in rewards))


@pytest.mark.parametrize("reward_set", ["default", "classic"])
@given(completion=completions, before=white_space, after=white_space)
@example(completion=PERFECT, before="\n", after=" \n")
def test_scores_ignore_white_space_around(
    reward_set: str, completion: str, before: str, after: str
) -> None:
    assert score(before + completion + after, "72", reward_set) == score(
        completion, "72", reward_set
    )


NASTY = ["<answer>", "<reasoning>\n", "</answer><answer>", PERFECT, " ", "\n", "9", "1,", "1/"]
NASTY += ["$-", "-", "111,", "1.", ". 1", "x", "^{", "\\frac{1", "\\text{", "1 1/"]


@pytest.mark.parametrize("nasty", NASTY)
def test_reading_takes_linear_time(nasty: str) -> None:
    text = nasty * (300_000 // len(nasty))
    started = time.process_time()
    last_number(text)
    same_number(text, text)
    for completion in (text, f"<reasoning>{text}</reasoning><answer>{text}</answer>"):
        score(completion, "72")
        score(completion, "72", "classic")
    assert time.process_time() - started < 3


# Rewards as the trainer calls them


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_functions_take_what_the_trainer_passes(reward_set: str) -> None:
    columns = {"prompts": ["q", "q"], "completion_ids": [[1], [2]], "trainer_state": None}
    chats = [[{"role": "assistant", "content": text}] for text in (PERFECT, "no")]
    for reward in build_rewards(reward_set, max_completion_length=100):
        plain = reward.function(completions=[PERFECT, "no"], answer=["72", "72"], **columns)
        assert plain == reward.function(completions=chats, answer=["72", "72"], **columns)
        assert all(type(value) is float for value in plain)


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_the_trainer_logs_each_reward_by_its_own_name(reward_set: str, tmp_path: Path) -> None:
    path = write_rewards(tmp_path, "def mine(completions, **columns): return [0.0]")
    for reward in build_rewards(reward_set, (f"{path}:mine",), max_completion_length=10):
        assert reward.function.__name__ == reward.name  # by which TRL logs it


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (150, -1)]
)
def test_length_penalty_falls_over_the_last_fifth(length: int, value: float) -> None:
    rewards = build_rewards(max_completion_length=100)
    scores = score_with(rewards, PERFECT, "72", completion_ids=[0] * length)
    assert scores["length_penalty"] == pytest.approx(0.2 * value)


def test_length_penalty_needs_a_limit_and_token_ids() -> None:
    unlimited, limited = build_rewards(), build_rewards(max_completion_length=2)
    assert score_with(unlimited, PERFECT, "72", completion_ids=[0] * 9)["length_penalty"] == 0
    assert score_with(limited, PERFECT, "72")["length_penalty"] == 0


def test_a_batch_of_unequal_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        build_rewards()[0].function(completions=[PERFECT, PERFECT], answer=["72"])


# Building


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Pay:\n    value: float = {}\n"
        "def {}(completions, **columns): return [Pay().value for _ in completions]\n"
    )
    specs = []
    for folder, value, name in (("a", 1.0, "one"), ("b", 2.0, "two")):
        (tmp_path / folder).mkdir()
        specs.append(f"{write_rewards(tmp_path / folder, text.format(value, name))}:{name}")
    one, two = build_rewards("none", tuple(specs))
    assert one.function.__name__ == "one" and one.sha256 != two.sha256
    assert (one.function(completions=["x"]), two.function(completions=["x"])) == ([1.0], [2.0])
    modules = [module for name, module in sys.modules.items() if "custom_reward_mine" in name]
    assert {module.Pay().value for module in modules if hasattr(module, "Pay")} == {1.0, 2.0}


def test_weights_are_changed_by_name() -> None:
    rewards = build_rewards(weights={"format": 0.5})
    assert {reward.name: reward.weight for reward in rewards} == {
        "correctness": 1.0,
        "format": 0.5,
        "length_penalty": 0.2,
    }
    assert parse_reward_weights(("format=0.5", "correctness=2")) == {
        "format": 0.5,
        "correctness": 2.0,
    }


def test_custom_rewards_come_after_the_set(tmp_path: Path) -> None:
    path = write_rewards(
        tmp_path,
        "def brevity(completions, **columns): return [float(len(c) < 100) for c in completions]\n"
        "def maybe(completions, answer, **columns): return [None for gold in answer]\n",
    )
    rewards = build_rewards("none", (f"{path}:brevity=0.5", f"{path}:maybe"), {"brevity": 3})
    assert [(reward.name, reward.weight) for reward in rewards] == [("brevity", 3), ("maybe", 1.0)]
    assert score_with(rewards, PERFECT, "72") == {"brevity": 3.0, "total": 3.0}
    chat = [{"role": "assistant", "content": PERFECT}]
    assert rewards[0].function(completions=[chat], answer=["72"]) == [1.0]
    assert rewards[1].function(completions=[chat], answer=["72"]) == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_set": "best"}, "must be one of default, classic, none, got 'best'"),
        ({"reward_set": "none"}, "--reward-set none leaves no reward: add one"),
        ({"weights": {"form": 1.0}}, "one of correctness, format, length_penalty, got 'form'"),
        ({"custom": ("mine.py",)}, "must look like path/to/file.py:function=0.5, got 'mine.py'"),
        ({"custom": (":mine",)}, "must look like"),
        ({"custom": ("FILE:",)}, "must look like"),
        ({"custom": ("FILE:good=much",)}, "weight must be a number such as 0.5, got 'much'"),
        ({"custom": ("FILE:good=",)}, "weight must be a number such as 0.5, got ''"),
        ({"custom": ("FILE:good=nan",)}, "weight must be a number"),
        ({"custom": ("rewards.txt:good",)}, "must name a .py file, got rewards.txt"),
        ({"custom": ("FILE:nope",)}, r"no function 'nope': it has good, correctness, slow, bare$"),
        ({"custom": ("FILE:Thing",)}, "no function 'Thing'"),
        ({"custom": ("FILE:bare",)}, r"must end its parameters with \*\*columns"),
        ({"custom": ("FILE:good", "FILE:good")}, "gives the name 'good' twice"),
        ({"custom": ("FILE:correctness",)}, "gives the name 'correctness' twice"),
    ],
)
def test_what_cannot_be_built_says_why(arguments: dict, message: str, tmp_path: Path) -> None:
    path = write_rewards(
        tmp_path,
        "from json import loads\n"
        "class Thing: pass\n"
        "def good(completions, **columns): return [1.0]\n"
        "def correctness(completions, **columns): return [1.0]\n"
        "async def slow(completions, **columns): return [1.0]\n"
        "def bare(completions, answer): return [1.0]\n",
    )
    custom = tuple(spec.replace("FILE", path) for spec in arguments.get("custom", ()))
    with pytest.raises(ValueError, match=message):
        build_rewards(**{**arguments, "custom": custom})


@pytest.mark.parametrize("pair", ["format", "=1", "format=", "format=x", "format=inf"])
def test_a_weight_that_cannot_be_read_says_why(pair: str) -> None:
    with pytest.raises(ValueError, match=r"^--reward-weight"):
        parse_reward_weights((pair,))


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.py does not exist: check the path"):
        build_rewards(custom=(f"{tmp_path}/gone.py:mine",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", r"cannot be imported: ModuleNotFoundError .* at mine\.py:1"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_fails_on_import_says_why(text: str, message: str, tmp_path: Path) -> None:
    path = write_rewards(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        build_rewards(custom=(f"{path}:mine",))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1 / len(c) for c in completions]", r"ZeroDivisionError .* at mine\.py:2, on .*''"),
        ("[] if len(completions) == 1 else 1 / 0", "on a batch of 2, the first completion 'one'"),
        ("[c[0]['content'] for c in completions]", "it gets completions as plain strings"),
    ],
)
def test_an_error_in_a_custom_reward_names_it_and_the_completion(
    body: str, message: str, tmp_path: Path
) -> None:
    path = write_rewards(tmp_path, f"def mine(completions, **columns):\n    return {body}")
    [reward] = build_rewards("none", (f"{path}:mine",))
    with pytest.raises(RewardError, match=f"reward 'mine' raised .*{message}") as caught:
        reward.function(completions=["one", ""], answer=["1", "2"])
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0, 2.0]", "'mine' returned 2 values for 1 completions"),
        ("[]", "'mine' returned 0 values for 1 completions"),
        ("None", "'mine' must return a list of numbers, one per completion, got None"),
        ("1.0", "'mine' must return a list of numbers"),
        ("'5'", "'mine' must return a list of numbers"),
        ("['5']", "'mine' returned '5': return a finite number, or None"),
        ("[float('nan')]", "'mine' returned nan: return a finite number"),
        ("[float('inf')]", "'mine' returned inf: return a finite number"),
    ],
)
def test_a_wrong_result_of_a_custom_reward_says_why(
    result: str, message: str, tmp_path: Path
) -> None:
    path = write_rewards(tmp_path, f"def mine(completions, **columns): return {result}")
    with pytest.raises(ValueError, match=message):
        score_with(build_rewards("none", (f"{path}:mine",)), PERFECT, "72")


# Gold answers


def test_gold_answers_that_can_never_be_paid_are_found(tmp_path: Path) -> None:
    answers = ["72", "1,200", "x + 1", "-3", "", "1e9999", "{brace}"]
    assert check_gold(answers, build_rewards()) == [2, 4, 5, 6]
    assert check_gold(answers, build_rewards("classic")) == [2, 4, 5, 6]
    path = write_rewards(tmp_path, "def mine(completions, **columns): return [0.0] * 7")
    assert check_gold(answers, build_rewards("none", (f"{path}:mine",))) == []


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K files in ../shared/gsm8k")
def test_the_real_gsm8k_is_read_and_every_gold_answer_paid() -> None:
    train, test = load_problems(str(GSM8K), "train"), load_problems(str(GSM8K), "test")
    assert (len(train), len(test)) == (7473, 1319)  # as published
    assert (train[0].answer, test[0].answer) == ("72", "18")
    assert [sum("," in problem.answer for problem in part) for part in (train, test)] == [79, 14]
    assert all(problem.solution and "####" not in problem.solution for problem in train)
    assert find_unpaid(train + test, build_rewards()) == []
