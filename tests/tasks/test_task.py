"""How a completion's tags are read."""

from datetime import date

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.policy.generate import Completion
from lora_grpo.results.scoring import build_eval_items, judge, read_item
from lora_grpo.rewards.builtin import build_rewards, score_with
from lora_grpo.tasks.task import NUMBER_TASK, Task

PERFECT = NUMBER_TASK.write("48 / 2 = 24\n48 + 24 = 72", "72")


def test_the_prompt_asks_for_the_tags_that_the_parser_reads() -> None:
    assert NUMBER_TASK.has_format(NUMBER_TASK.system_prompt.partition("\n")[2])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (PERFECT, "72"),
        ("<answer>  seventy two </answer>", "seventy two"),
        ("so <answer></answer>", ""),
        ("72", None),
        ("<answer>72", None),
        ("72</answer>", None),
        ("</answer>72<answer>", None),
        ("<answer>72</answer><answer>73</answer>", None),
        ("<answer>72</answer></answer>", None),
        ("<answer><answer>72</answer>", None),
        ("<ANSWER>72</ANSWER>", None),
    ],
)
def test_the_answer_stands_between_exactly_one_pair_in_order(
    completion: str, answer: str | None
) -> None:
    assert NUMBER_TASK.parse(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        PERFECT,
        f"\n\n {PERFECT}\n",
        "<reasoning>x</reasoning><answer>72</answer>",
        "<reasoning>x</reasoning>\n\n\t<answer>72</answer>",
    ],
)
def test_white_space_around_the_blocks_is_free(completion: str) -> None:
    assert NUMBER_TASK.has_format(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "72",
        "<reasoning> </reasoning><answer>72</answer>",
        "<reasoning>x</reasoning><answer>\n</answer>",
        "<reasoning>x</reasoning>",
        "<answer>72</answer>",
        "<answer>72</answer><reasoning>x</reasoning>",
        "<reasoning>x<answer>72</answer></reasoning>",
        "<reasoning>x<answer>72</reasoning></answer>",
        "<reasoning>x</answer>y</reasoning><answer>72",
        f"Sure! {PERFECT}",
        f"{PERFECT} Done.",
        PERFECT.replace("<answer>", "so <answer>"),
        PERFECT + PERFECT,
        PERFECT[:-1],
        PERFECT.upper(),
    ],
)
def test_anything_else_has_no_format(completion: str) -> None:
    assert not NUMBER_TASK.has_format(completion)


ODD = Task(
    name="odd",
    noun="number",
    compare=lambda answer, gold, row: answer == row["parity"],
    can_read=lambda text: True,
    find_last=lambda text: text.split()[-1],
    needs_row=True,
)


def test_a_task_judges_by_the_row_in_rewards_and_evaluation() -> None:
    problem = Problem(1, "3?", "3", columns={"parity": "odd", "when": date(2026, 1, 1)})
    text = ODD.write("3 is odd.", "odd")
    rewards = build_rewards(task=ODD)
    assert score_with(rewards, text, "3", **problem.columns)["correctness"] == 1
    assert score_with(rewards, text, "3", parity="even")["total"] == 0.2
    item = judge(problem, Completion(text, 5, False), ODD)
    assert item.strict and not item.lenient
    [row] = build_eval_items([problem], {"adapter": [item]}, ODD)
    assert row["columns"] == {"parity": "odd"}, "what JSON cannot hold is left out"
    assert judge(read_item(row), Completion(text, 5, False), ODD) == item
