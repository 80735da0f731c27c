"""Short texts: what counts as the same, and several gold answers."""

import pytest

from lora_grpo.tasks.text import TEXT_TASK, join_golds, split_golds


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[("paris", "Paris"), ("Paris.", "Paris"), ("the  Eiffel\nTower", "Eiffel Tower")],
        *[('"Paris"', "Paris"), ("**Paris**", "Paris"), ("Zürich", "Zu\u0308rich"), ("?", "?")],
        *[("City of Paris", '["Paris", "City of Paris"]'), ("vitamin A", "Vitamin A"), ("a", "A")],
    ],
)
def test_how_a_text_is_written_does_not_count(answer: str, gold: str) -> None:
    assert TEXT_TASK.same(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[("", "Paris"), ("Paris, France", "Paris"), ("Paris or Rome", "Paris"), (".", "")],
        *[("35", "3.5"), ("-5", "5"), ("C", "C++"), ("not Paris", "Paris"), ("Pari", "Paris")],
        ('["Paris", "City of Paris"]', '["Paris", "City of Paris"]'),
    ],
)
def test_another_text_is_not_the_same(answer: str, gold: str) -> None:
    assert not TEXT_TASK.same(answer, gold)


def test_several_gold_answers_travel_as_one_text() -> None:
    golds = ["Paris", "Ville de l'\u00c9toile", "[x]"]
    assert split_golds(join_golds([*golds, "Paris"])) == golds
    assert split_golds(join_golds(["[x]"])) == ["[x]"]
    assert TEXT_TASK.is_right(
        TEXT_TASK.write("so", TEXT_TASK.write_gold(join_golds(golds))), join_golds(golds)
    )
