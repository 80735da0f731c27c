"""Tricky completions with a gold answer each, and the ranking that any set of rewards must give.

Rewards go in; scores and violated rules come out. A reward that pays a flawed completion as much as
a right one teaches the flaw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_grpo.data.prompt import build_messages
from lora_grpo.rewards.builtin import Reward, score_with
from lora_grpo.tasks.task import NUMBER_TASK

Standing = Literal["right", "loose", "flawed", "tagless"]
QUESTION = "How many is that?"
REASONING = "48 / 2 = 24 and 48 + 24 = 72."
MEGABYTE = "So 48 + 24 is what I need.\n" * 38_000
NEAR = 1e-9

OUTRANKS = "every correct, well-formed completion outranks every other one"
OUTRANKS_IN_LAYOUT = "every correct completion in the prompt's layout outranks every flawed one"
UNPAID = "a number without tags is paid nothing"


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
# Completions of a problem whose gold answer is 72.
PERFECT = lay_out("72")
ANSWER_BLOCK = NUMBER_TASK.write_answer("72")
REASONING_BLOCK = PERFECT.removesuffix(f"\n{ANSWER_BLOCK}")
RIGHT = {
    "perfect": PERFECT,
    "many lines": lay_out("72", "Half of 48 is 24.\n\nThen:\n48 + 24 = 72"),
    "white space around": f"\n\n  {PERFECT}\n\n",
    "a megabyte of reasoning": lay_out("72", MEGABYTE),
}
LOOSE = {
    "all on one line": PERFECT.replace("\n", ""),
    "blank lines between": PERFECT.replace("\n", "\n\n"),
}
FLAWED = {
    "empty": "",
    "empty reasoning": lay_out("72", ""),
    "no line in the reasoning": f"<reasoning>\n</reasoning>\n{ANSWER_BLOCK}",
    "blank reasoning": lay_out("72", " \t\n "),
    "blank answer": lay_out(" "),
    "no reasoning block": ANSWER_BLOCK,
    "no answer block": REASONING_BLOCK,
    "answer before reasoning": f"{ANSWER_BLOCK}\n{REASONING_BLOCK}",
    "answer inside reasoning": f"<reasoning>\n{REASONING}\n{ANSWER_BLOCK}\n</reasoning>",
    "nested tags": lay_out("<answer>72</answer>"),
    "two answers": f"{PERFECT}\n<answer>\n73\n</answer>",
    "two equal answers": f"{PERFECT}\n{ANSWER_BLOCK}",
    "two whole completions": f"{PERFECT}\n{PERFECT}",
    "text before": f"Sure!\n{PERFECT}",
    "text after the answer": f"{PERFECT}\nI hope this helps!",
    "truncated in the reasoning": PERFECT[: len(PERFECT) // 3],
    "truncated in the answer": PERFECT[: PERFECT.index("72") + 2],
    "truncated in the last tag": PERFECT[:-4],
    "closing tag first": PERFECT.replace("<answer>", "</answer>", 1),
    "capital tags": PERFECT.upper(),
    "tags repeated 1,000 times": PERFECT * 1_000,
    "opening tags 1,000 times": "<reasoning>\n" * 1_000 + "<answer>\n" * 1_000 + "72",
}
TAGLESS = {
    "no tags, number alone": "72",
    "no tags, worked": f"{REASONING}\n72",
    "no tags, sentence": "The answer is 72.",
    "no tags, GSM8K's mark": f"{REASONING}\n#### 72",
    "no tags, boxed": r"So we get \boxed{72}.",
    "no tags, a megabyte of text": MEGABYTE + "72",
}


def build_corpus() -> list[Case]:
    """Return every case, the right ones first."""

    def answers(cases: Sequence[tuple[str, str, str]], standing: Standing) -> list[Case]:
        return [Case(name, lay_out(written), gold, standing) for name, written, gold in cases]

    def forms(cases: dict[str, str], standing: Standing) -> list[Case]:
        return [Case(name, completion, "72", standing) for name, completion in cases.items()]

    return [
        *forms(RIGHT, "right"),
        *answers(RIGHT_ANSWERS, "right"),
        *forms(LOOSE, "loose"),
        *answers(WRONG_ANSWERS, "flawed"),
        *forms(FLAWED, "flawed"),
        *forms(TAGLESS, "tagless"),
    ]


def rank(rewards: list[Reward], reward_set: str, row: dict[str, Any] | None = None) -> Ranking:
    """Score the corpus and check the rules that apply to this set.

    The first rule needs a reward named `correctness`. In the `classic` set, which pays for line
    breaks, `loose` completions are left out of it. The second is for the `default` set. Rewards of
    the user's own are there to pay for something else: the rules hold without them, and what they
    change is remarked. `row` holds the columns of a row of the data, for rewards that ask.
    """
    columns = {**(row or {}), "prompts": build_messages(QUESTION), "question": QUESTION}
    columns.pop("answer", None)
    scores = [
        (case, score_with(rewards, case.completion, case.answer, **columns))
        for case in build_corpus()
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
