"""Tricky completions with a gold answer each, and the ranking that any set of rewards must give.

Rewards go in; scores and violated rules come out. A reward that pays a flawed completion as much as
a right one teaches the flaw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import build_messages
from lora_grpo.rewards.builtin import Reward, score_with
from lora_grpo.rewards.tricks import Tricks, make_tricks
from lora_grpo.tasks.task import NUMBER_TASK, Task

Standing = Literal["right", "loose", "flawed", "tagless"]
QUESTION = "How many is that?"
REASONING = "48 / 2 = 24 and 48 + 24 = 72."
MEGABYTE = "So 48 + 24 is what I need.\n" * 38_000
NEAR = 1e-9

OUTRANKS = "every correct, well-formed completion outranks every other one"
OUTRANKS_IN_LAYOUT = "every correct completion in the prompt's layout outranks every flawed one"
UNPAID = "an answer without tags is paid nothing"


@dataclass(frozen=True)
class Case:
    """One completion: `right` as the prompt asks, `loose` only in other white space, or not."""

    name: str
    completion: str
    answer: str
    standing: Standing


Scores = list[tuple[Case, dict[str, float]]]


@dataclass(frozen=True)
class Ranking:
    """Each case's scores, in the corpus's order, the rules checked, what broke them, and where
    rewards of the user's own pay a flawed case as much as a right one."""

    scores: Scores
    rules: list[str]
    violations: list[str]
    remarks: list[str]


def lay_out(answer: str, reasoning: str = REASONING) -> str:
    """Return a completion in the layout that the prompt shows."""
    return NUMBER_TASK.write(reasoning, answer)


NUMBER_TRICKS = Tricks({}, {}, "73")  # whose answers have gold answers of their own
RIGHT_ANSWERS = (
    ("Unicode minus", "\u22123", "-3"),
    ("answered 1,200", "1,200", "1200"),
    ("answered 1200", "1200", "1,200"),
    ("answered $1,200.00", "$1,200.00", "1200"),
    ("answered 72 clips", "72 clips", "72"),
    ("answered 72 clips per day.", "72 clips per day.", "72"),
    ("answered -3", "-3", "-3"),
    ("answered -$3", "-$3", "-3"),
    ("answered 1/2", "1/2", "0.5"),
    ("answered 3.50", "3.50", "3.5"),
    ("answered 50%", "50%", "50"),
)
WRONG_ANSWERS = (
    ("wrong number 71", "71", "72"),
    ("gold 12 inside 312", "312", "12"),
    ("part 12 of gold 312", "12", "312"),
    ("sign lost 3", "3", "-3"),
    ("malformed comma 7,2", "7,2", "72"),
    ("scale word 72 million", "72 million", "72"),
    ("scale letter 72k", "72k", "72"),
    ("two numbers 72 or 73", "72 or 73", "72"),
    ("words seventy-two", "seventy-two", "72"),
    ("Unicode digits", "\uff17\uff12", "72"),
    ("NaN", "NaN", "72"),
    ("NaN in the gold too", "NaN", "NaN"),
    ("infinity", "inf", "72"),
    ("exponent 1e999", "1e999", "72"),
    ("division 72/0", "72/0", "72"),
    ("number of 5,000 digits", "9" * 5_000, "72"),
)


def right_forms(gold: str) -> dict[str, str]:
    """Return completions as the prompt asks for them."""
    perfect = lay_out(gold)
    return {
        "perfect": perfect,
        "many lines": lay_out(gold, "Half of 48 is 24.\n\nThen:\n48 + 24 = 72"),
        "white space around": f"\n\n  {perfect}\n\n",
        "a megabyte of reasoning": lay_out(gold, MEGABYTE),
    }


def loose_forms(gold: str) -> dict[str, str]:
    """Return completions in other white space."""
    perfect = lay_out(gold)
    return {
        "all on one line": perfect.replace("\n", ""),
        "blank lines between": perfect.replace("\n", "\n\n"),
    }


def flawed_forms(gold: str, other: str) -> dict[str, str]:
    """Return completions in other layouts; `other` is a wrong answer."""
    perfect, block = lay_out(gold), NUMBER_TASK.write_answer(gold)
    return {
        "empty": "",
        "empty reasoning": lay_out(gold, ""),
        "no line in the reasoning": f"<reasoning>\n</reasoning>\n{block}",
        "blank reasoning": lay_out(gold, " \t\n "),
        "blank answer": lay_out(" "),
        "no reasoning block": block,
        "no answer block": perfect.removesuffix(f"\n{block}"),
        "answer before reasoning": f"{block}\n{perfect.removesuffix(block)}",
        "answer inside reasoning": f"<reasoning>\n{REASONING}\n{block}\n</reasoning>",
        "nested tags": lay_out(f"<answer>{gold}</answer>"),
        "two answers": f"{perfect}\n<answer>\n{other}\n</answer>",
        "two equal answers": f"{perfect}\n{block}",
        "two whole completions": f"{perfect}\n{perfect}",
        "text before": f"Sure!\n{perfect}",
        "text after the answer": f"{perfect}\nI hope this helps!",
        "truncated in the reasoning": perfect[: len(perfect) // 3],
        "truncated in the answer": perfect[: perfect.rindex(gold) + len(gold)],
        "truncated in the last tag": perfect[:-4],
        "closing tag first": perfect.replace("<answer>", "</answer>", 1),
        "capital tags": perfect.upper(),
        "tags repeated 1,000 times": perfect * 1_000,
        "opening tags 1,000 times": "<reasoning>\n" * 1_000 + "<answer>\n" * 1_000 + gold,
    }


def tagless_forms(gold: str) -> dict[str, str]:
    """Return completions without tags."""
    return {
        "no tags, answer alone": gold,
        "no tags, worked": f"{REASONING}\n{gold}",
        "no tags, sentence": f"The answer is {gold}.",
        "no tags, GSM8K's mark": f"{REASONING}\n#### {gold}",
        "no tags, boxed": rf"So we get \boxed{{{gold}}}.",
        "no tags, a megabyte of text": MEGABYTE + gold,
    }


def build_corpus(
    gold: str = "72", answers: Tricks = NUMBER_TRICKS, written: str | None = None
) -> list[Case]:
    """Return every case, the right ones first: each layout with the gold answer as it is `written`,
    and each tricky answer in the right layout."""
    plain = gold if written is None else written

    def forms(cases: dict[str, str], standing: Standing) -> list[Case]:
        return [Case(name, completion, gold, standing) for name, completion in cases.items()]

    def laid_out(cases: dict[str, str], standing: Standing) -> list[Case]:
        return forms({name: lay_out(answer) for name, answer in cases.items()}, standing)

    def numbers(cases: Sequence[tuple[str, str, str]], standing: Standing) -> list[Case]:
        if answers is not NUMBER_TRICKS:
            return []
        return [Case(name, lay_out(one), gold, standing) for name, one, gold in cases]

    return [
        *forms(right_forms(plain), "right"),
        *laid_out(answers.right, "right"),
        *numbers(RIGHT_ANSWERS, "right"),
        *forms(loose_forms(plain), "loose"),
        *laid_out(answers.wrong, "flawed"),
        *numbers(WRONG_ANSWERS, "flawed"),
        *forms(flawed_forms(plain, answers.other), "flawed"),
        *forms(tagless_forms(plain), "tagless"),
    ]


def rank(
    rewards: list[Reward],
    reward_set: str,
    row: dict[str, Any] | None = None,
    task: Task = NUMBER_TASK,
    problem: Problem | None = None,
) -> Ranking:
    """Score the corpus and check the rules that apply to this set.

    The first rule needs a reward named `correctness`. In the `classic` set, which pays for line
    breaks, `loose` completions are left out of it. The second is for the `default` set. Rewards of
    the user's own are there to pay for something else: the rules hold without them, and what they
    change is remarked. `row` holds the columns of a row of the data, for rewards that ask; except
    for numbers, the tricky answers are to `problem`, or to a made-up one. Nothing is checked of a
    task that reads more of a completion than its answer tags.
    """
    if not task.reads_tags:
        return Ranking([], [], [], [])
    question, cases = QUESTION, build_corpus()
    if task is not NUMBER_TASK:
        chosen, answers = make_tricks(task, problem)
        question = chosen.question
        cases = build_corpus(chosen.answer, answers, task.write_gold(chosen.answer))
    columns = {**(row or {}), "prompts": build_messages(question), "question": question}
    columns.pop("answer", None)
    scores = [
        (case, score_with(rewards, case.completion, case.answer, **columns)) for case in cases
    ]
    rules = []
    if any(reward.name == "correctness" for reward in rewards):
        rules.append(OUTRANKS_IN_LAYOUT if reward_set == "classic" else OUTRANKS)
    if reward_set == "default":
        rules.append(UNPAID)
    ruling = [
        reward.name for reward in rewards if reward.name == "correctness" or not reward.sha256
    ]
    violations = find_violations(rules, scores, ruling)
    found = find_violations(rules, scores, [reward.name for reward in rewards])
    return Ranking(scores, rules, violations, [line for line in found if line not in violations])


def find_violations(rules: list[str], scores: Scores, names: Sequence[str]) -> list[str]:
    """Return what breaks the rules where only the rewards of these names are paid: each flawed case
    that gets as much as the worst-paid right one, and each pay without tags."""
    totals = [
        (case, sum((values[name] for name in names if name in values), start=0.0))
        for case, values in scores
    ]
    found = []
    if OUTRANKS in rules or OUTRANKS_IN_LAYOUT in rules:
        best = ("right", "loose") if OUTRANKS in rules else ("right",)
        good = [(case, total) for case, total in totals if case.standing in best]
        lowest, floor = min(good, key=lambda pair: pair[1])
        found += [
            f"{case.name!r} gets {total:.3g}, {lowest.name!r} only {floor:.3g}"
            for case, total in totals
            if case.standing in ("flawed", "tagless") and total > floor - NEAR
        ]
    if UNPAID in rules:
        found += [
            f"{case.name!r} gets {total:.3g}, it must get nothing"
            for case, total in totals
            if case.standing == "tagless" and total > NEAR
        ]
    return found
