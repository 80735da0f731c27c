"""The generators of `reasoning-gym`: their settings, and their own scorers as the task."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.policy.generate import Completion
from lora_grpo.results.scoring import build_eval_items, judge, read_item
from lora_grpo.tasks.reasoning_gym import PREFIX, REASONING_GYM, make_entry, read_generators, score

gym = pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym (a C compiler)")


def row_of(text: str, index: int = 0, seed: int = 7) -> dict[str, Any]:
    place = {"generator": text, "seed": seed, "index": index}
    return {**make_entry(text, seed, index), **place}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("chain_sum:max_terms=3:size=5", {"max_terms": 3}),
        ("basic_arithmetic:operators=['+','-']:allow_negation=false", None),
        ("calendar_arithmetic:tasks=weekday_offset", {"tasks": ["weekday_offset"]}),
    ],
)
def test_an_entry_is_the_package_s_own(text: str, settings: dict[str, Any] | None) -> None:
    name = text.partition(":")[0]
    settings = settings or {"operators": ["+", "-"], "allow_negation": False}
    theirs = gym.create_dataset(name, seed=7, size=1000, **settings)
    for index in range(5):
        row = row_of(text, index)
        assert theirs[index] == {key: row[key] for key in ("question", "answer", "metadata")}
        for answer in (row["answer"], "12", "Friday", row["answer"] + "0"):
            assert score(answer, row) == theirs.score_answer(answer, theirs[index])


def test_several_generators_each_with_its_settings() -> None:
    text = "chain_sum:size=9:seed=3,calendar_arithmetic:tasks=[is_leap_year,count_days]:test_size=4"
    first, second = read_generators(PREFIX + text)
    assert (first.name, first.settings, first.size, first.seed) == ("chain_sum", {}, 9, 3)
    assert second.settings == {"tasks": ["is_leap_year", "count_days"]}
    assert (second.size, second.test_size) == (2000, 4)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("chain_sums", ["'chain_sums'", "chain_sum or"]),
        ("", ["GALLERY.md"]),
        ("chain_sum:max_term=2", ["'max_term=2'", "perhaps you meant max_terms", "max_digits=4"]),
        ("chain_sum:max_terms", ["setting=value", "test_size=256"]),
        ("chain_sum:max_terms=many", ["max_terms", "6", "'many'"]),
        ("basic_arithmetic:allow_negation=1", ["allow_negation", "True", "got 1"]),
        ("word_sorting:transformation=upper", ["lowercase, uppercase", "'upper'"]),
        ("chain_sum:size=0", ["size must be from 1", "got 0"]),
        ("chain_sum:seed=1000", ["seed must be from 0 to 999"]),
        ("chain_sum,chain_sum", ["chain_sum twice"]),
        ("composite", ["separated by commas"]),
        ("simple_integration", ["runs the model's text"]),
        ("ransom_note", ["differ from one process to the next"]),
    ],
)
def test_what_cannot_be_drawn_is_said(text: str, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_generators(PREFIX + text)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_settings_that_the_package_refuses_are_its_own_words() -> None:
    with pytest.raises(
        ValueError, match=r"chain_sum: reasoning-gym refuses .*max_terms must be >="
    ):
        make_entry("chain_sum:min_terms=9", 0, 0)


def test_a_lack_of_the_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        read_generators(PREFIX + "chain_sum")


def test_a_puzzle_has_several_right_answers() -> None:
    row = row_of("countdown")
    numbers, target = row["metadata"]["numbers"], row["metadata"]["target"]
    assert not score(str(target), row) >= 1
    turned = f"({row['answer']})"
    assert turned != row["answer"] and len(numbers) > 1
    completion = REASONING_GYM.write("I try.", turned)
    assert REASONING_GYM.is_right(completion, row["answer"], row)
    assert REASONING_GYM.same(row["answer"], turned, row)
    assert not REASONING_GYM.same(str(target), turned, row)


@pytest.mark.parametrize("name", ["countdown", "puzzle24", "n_queens", "string_insertion"])
@pytest.mark.parametrize("code", ["open('{}', 'w')", "(open)('{}','w')", "[open('{}','w')]"])
def test_an_answer_is_never_run_as_code(tmp_path: Path, name: str, code: str) -> None:
    victim = tmp_path / "written"
    assert score(code.format(victim), row_of(name)) == 0
    assert not victim.exists()
    assert score("9**9**9", row_of(name)) == 0  # would take for ever
    assert score(row_of(name)["answer"], row_of(name)) == 1


def test_an_answer_that_a_scorer_cannot_read_pays_nothing() -> None:
    row = row_of("prime_factorization")
    with pytest.raises(ValueError, match="invalid literal"):
        gym.create_dataset("prime_factorization", seed=7).score_answer("x", row)
    assert score("x", row) == 0
    assert score("1e99999999", row_of("coin_flip")) == 0  # would fill the memory


def test_an_evaluated_problem_is_judged_again_from_its_record() -> None:
    rows = [row_of("spell_backward", index) for index in range(3)]
    problems = [
        Problem(number, row["question"], row["answer"], columns=row)
        for number, row in enumerate(rows, start=1)
    ]
    said = [rows[0]["answer"].upper(), rows[0]["answer"], rows[2]["answer"]]
    done = [Completion(REASONING_GYM.write("So.", text), 5, False) for text in said]
    items = list(map(judge, problems, done, [REASONING_GYM] * 3))
    assert [item.strict for item in items] == [True, False, True]  # letter case is free there
    saved = json.loads(json.dumps(build_eval_items(problems, {"base": items}, REASONING_GYM)))
    again = [
        judge(read_item(row), text, REASONING_GYM) for row, text in zip(saved, done, strict=True)
    ]
    assert again == items


@pytest.mark.parametrize(
    "text", ["{}", "It is {}.", "So:\nThe answer is: {}", "<answer>{}</answer>, done", "x\n\n{}.\n"]
)
def test_lenient_reads_the_last_thing_said(text: str) -> None:
    row = row_of("calendar_arithmetic:tasks=weekday_offset")
    gold = row["answer"]
    assert REASONING_GYM.is_right_anywhere(text.format(gold), gold, row)
    assert not REASONING_GYM.is_right_anywhere(f"{gold}? No, I give up.", gold, row)
