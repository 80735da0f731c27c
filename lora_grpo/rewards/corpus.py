"""Tricky completions with a gold answer each, and the ranking that any set of rewards must give.

Rewards go in; scores and violated rules come out. A reward that pays a flawed completion as much as
a right one teaches the flaw.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lora_grpo.data.prompt import build_messages
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.rewards.builtin import Reward, score_with

Standing = Literal["right", "loose", "flawed", "tagless"]
QUESTION = "How many is that?"
REASONING = "48 / 2 = 24 and 48 + 24 = 72."
MEGABYTE = "So 48 + 24 is what I need.\n" * 38_000
NEAR = 1e-9

OUTRANKS = "every correct, well-formed completion outranks every other one"
OUTRANKS_IN_LAYOUT = "every correct completion in the prompt's layout outranks every flawed one"
TAGLESS = "a number without tags is paid nothing"


@dataclass(frozen=True)
class Case:
    """One completion: `right` as the prompt asks, `loose` only in other white space, or not."""

    name: str
    completion: str
    answer: str
    standing: Standing


@dataclass(frozen=True)
class Ranking:
    """Each case's scores, in the corpus's order, the rules checked, what broke them, and where
    rewards of the user's own pay a flawed case as much as a right one."""

    scores: list[tuple[Case, dict[str, float]]]
    rules: list[str]
    violations: list[str]
    remarks: list[str]


def lay_out(answer: str, reasoning: str = REASONING) -> str:
    """Return a completion in the layout that the prompt shows."""
    return NUMBER_TASK.write(reasoning, answer)


def right_cases() -> Iterable[Case]:
    perfect = lay_out("72")
    numbers = [
        ("1,200", "1200"),
        ("1200", "1,200"),
        ("$1,200.00", "1200"),
        ("72 clips", "72"),
        ("72 clips per day.", "72"),
        ("-3", "-3"),
        ("-$3", "-3"),
        ("1/2", "0.5"),
        ("3.50", "3.5"),
        ("50%", "50"),
    ]
    completions = {
        "perfect": perfect,
        "many lines": lay_out("72", "Half of 48 is 24.\n\nThen:\n48 + 24 = 72"),
        "white space around": f"\n\n  {perfect}\n\n",
        "a megabyte of reasoning": lay_out("72", MEGABYTE),
    }
    for name, completion in completions.items():
        yield Case(name, completion, "72", "right")
    yield Case("Unicode minus", lay_out("\u22123"), "-3", "right")
    for written, gold in numbers:
        yield Case(f"answered {written}", lay_out(written), gold, "right")


def loose_cases() -> Iterable[Case]:
    line = f"<reasoning>{REASONING}</reasoning><answer>72</answer>"
    yield Case("all on one line", line, "72", "loose")
    yield Case("blank lines between", lay_out("72").replace("\n", "\n\n"), "72", "loose")


def flawed_answers() -> Iterable[Case]:
    answers = [
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
    ]
    return [Case(name, lay_out(written), gold, "flawed") for name, written, gold in answers]


def flawed_forms() -> Iterable[Case]:
    perfect = lay_out("72")
    answer, reasoning = "<answer>\n72\n</answer>", f"<reasoning>\n{REASONING}\n</reasoning>"
    completions = {
        "empty": "",
        "empty reasoning": lay_out("72", ""),
        "no line in the reasoning": "<reasoning>\n</reasoning>\n" + answer,
        "blank reasoning": lay_out("72", " \t\n "),
        "blank answer": lay_out(" "),
        "no reasoning block": answer,
        "no answer block": reasoning,
        "answer before reasoning": f"{answer}\n{reasoning}",
        "answer inside reasoning": f"<reasoning>\n{REASONING}\n{answer}\n</reasoning>",
        "nested tags": lay_out("<answer>72</answer>"),
        "two answers": f"{perfect}\n<answer>\n73\n</answer>",
        "two equal answers": f"{perfect}\n{answer}",
        "two whole completions": f"{perfect}\n{perfect}",
        "text before": f"Sure!\n{perfect}",
        "text after the answer": f"{perfect}\nI hope this helps!",
        "truncated in the reasoning": perfect[: len(perfect) // 3],
        "truncated in the answer": perfect[: perfect.index("72") + 2],
        "truncated in the last tag": perfect[:-4],
        "closing tag first": lay_out("72").replace("<answer>", "</answer>", 1),
        "capital tags": perfect.upper(),
        "tags repeated 1,000 times": perfect * 1_000,
        "opening tags 1,000 times": "<reasoning>\n" * 1_000 + "<answer>\n" * 1_000 + "72",
    }
    return [Case(name, completion, "72", "flawed") for name, completion in completions.items()]


def tagless_cases() -> Iterable[Case]:
    completions = {
        "no tags, number alone": "72",
        "no tags, worked": f"{REASONING}\n72",
        "no tags, sentence": "The answer is 72.",
        "no tags, GSM8K's mark": f"{REASONING}\n#### 72",
        "no tags, boxed": r"So we get \boxed{72}.",
        "no tags, a megabyte of text": MEGABYTE + "72",
    }
    return [Case(name, completion, "72", "tagless") for name, completion in completions.items()]


def build_corpus() -> list[Case]:
    """Return every case, the right ones first."""
    return [
        *right_cases(),
        *loose_cases(),
        *flawed_answers(),
        *flawed_forms(),
        *tagless_cases(),
    ]


def rank(rewards: list[Reward], reward_set: str, columns: dict[str, Any] | None = None) -> Ranking:
    """Score the corpus and check the rules that apply to this set.

    The first rule needs a reward named `correctness`. In the `classic` set, which pays for line
    breaks, `loose` completions are left out of it. The second is for the `default` set. Rewards of
    the user's own are there to pay for something else: the rules hold without them, and what they
    change is remarked. `columns` holds other columns of a row of the data, for rewards that ask.
    """
    told = {**(columns or {}), "prompts": build_messages(QUESTION), "question": QUESTION}
    corpus = build_corpus()
    scores = [(case, score_with(rewards, case.completion, case.answer, **told)) for case in corpus]
    own = {reward.name for reward in rewards if reward.sha256} - {"correctness"}
    ruled = [(case, without(values, own)) for case, values in scores]
    rules, violations, remarks = [], [], []
    if any(reward.name == "correctness" for reward in rewards):
        rules.append(OUTRANKS_IN_LAYOUT if reward_set == "classic" else OUTRANKS)
        best = ("right",) if reward_set == "classic" else ("right", "loose")
        violations += find_outranked(ruled, best)
        remarks += find_outranked(scores, best)
    if reward_set == "default":
        rules.append(TAGLESS)
        violations += find_paid_tagless(ruled)
        remarks += find_paid_tagless(scores)
    return Ranking(scores, rules, violations, [line for line in remarks if line not in violations])


def without(values: dict[str, float], names: set[str]) -> dict[str, float]:
    """Return scores without those of some rewards, and their new sum."""
    kept = {name: value for name, value in values.items() if name not in names | {"total"}}
    return {**kept, "total": sum(kept.values(), start=0.0)}


def find_outranked(scores: list[tuple[Case, dict[str, float]]], best: tuple[str, ...]) -> list[str]:
    """Name each flawed case that gets as much as the worst-paid of the best."""
    lowest, floor = min(
        ((case, values["total"]) for case, values in scores if case.standing in best),
        key=lambda pair: pair[1],
    )
    return [
        f"{case.name!r} gets {values['total']:.3g}, {lowest.name!r} only {floor:.3g}"
        for case, values in scores
        if case.standing in ("flawed", "tagless") and values["total"] > floor - NEAR
    ]


def find_paid_tagless(scores: list[tuple[Case, dict[str, float]]]) -> list[str]:
    return [
        f"{case.name!r} gets {values['total']:.3g}, it must get nothing"
        for case, values in scores
        if case.standing == "tagless" and values["total"] > NEAR
    ]
