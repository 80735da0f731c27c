"""How a completion's tags are read."""

import pytest

from lora_grpo.data.task import NUMBER_TASK

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
