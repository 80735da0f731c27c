"""What is wrong with a run: one small function per fault, each a pure function of its history.

A rule returns a `Finding`, or None where all is well or too little is known. The rules stand in the
order of causes: what an earlier one names often explains what a later one sees. Unless a rule says
otherwise, figures are means over WINDOW steps, so that one odd step raises nothing. Thresholds
without a source were set between the runs that show the fault and healthy ones (docs/diagnosis.md).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise, takewhile
from statistics import fmean, pvariance, stdev

from lora_grpo.diagnosis.history import WINDOW, History, Row
from lora_grpo.grpo.batch import read_verdict

DEAD = 0.9  # of the groups: what is left is too little to learn from
NOISE = 3.0  # standard errors: what chance alone hardly ever does


@dataclass(frozen=True)
class Finding:
    """A fault: what is seen since which step, why that happens, and which setting to change."""

    since: int
    seen: str
    why: str
    cure: str
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.rule}, since step {self.since}: {self.seen}; {self.why}. {self.cure}."


Rule = Callable[[History], Finding | None]


def held_since(history: History, name: str, holds: Callable[[float], bool]) -> int | None:
    """Return the first step of the last stretch in which each mean over WINDOW steps holds, or None
    where the latest one does not. A shorter run is one window."""
    series, since = history.series(name), None
    length = min(WINDOW, max(1, len(series)))
    for end in range(len(series), length - 1, -1):
        window = series[end - length : end]
        if not holds(fmean(figure for _, figure in window)):
            break
        since = window[0][0]
    return since


@dataclass(frozen=True)
class Change:
    """The first, the best and the last WINDOW steps of a figure; `noise` is the standard error of
    the difference of two such means."""

    first: float
    best: float
    best_step: int
    last: float
    noise: float

    @property
    def fell(self) -> bool:
        """From its best, by more than noise."""
        return self.best - self.last > NOISE * self.noise

    @property
    def rose(self) -> bool:
        """From its start, by more than noise."""
        return self.last - self.first > NOISE * self.noise


def change(history: History, name: str) -> Change | None:
    """Return how a figure moved, or None where it has fewer than two windows of steps."""
    series = history.series(name)
    if len(series) < 2 * WINDOW:
        return None
    figures = [figure for _, figure in series]
    means = [fmean(figures[at : at + WINDOW]) for at in range(len(figures) - WINDOW + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    # From one step to the next, so that a trend is no noise.
    differences = [after - before for before, after in pairwise(figures)]
    return Change(
        means[0], means[best], series[best][0], means[-1], stdev(differences) / WINDOW**0.5
    )


def window_from(history: History, name: str, step: int) -> float:
    """Return the mean of a figure in the first WINDOW steps from a step on."""
    return fmean([figure for at, figure in history.series(name) if at >= step][:WINDOW])


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def setting(history: History, flag: str, factor: float = 1.0, verb: str = "raise") -> str:
    """Return the advice to change a flag, with values where the run recorded its own."""
    now = history.settings.get(flag.removeprefix("--").replace("-", "_"))
    if not isinstance(now, int | float) or not now:
        return f"{verb} {flag}"
    value = now * factor
    shown = f"{value:.0f}" if isinstance(now, int) else f"{value:.2g}"
    return f"{verb} {flag} to {shown} (now {now:g})"


def capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


# --- nothing to learn from ---


def not_finite(history: History) -> Finding | None:
    """The loss or the gradient has no finite value in the last two steps."""
    recent = history.steps[-2:]
    names = ("loss", "grad_norm")
    broken = [name for name in names if all(name in row for row in recent)]
    for name in broken:
        if len(recent) == 2 and not any(
            isinstance(row[name], int | float) and math.isfinite(row[name]) for row in recent
        ):
            return Finding(
                recent[0]["step"],
                f"{name} is not a finite number",
                "the weights of the adapter are damaged or the numbers of --dtype overflow",
                f"Resume from the last good checkpoint and "
                f"{setting(history, '--learning-rate', 0.1, 'lower')}",
            )
    return None


def truncated(history: History) -> Finding | None:
    """Half of the completions or more end at the limit; or a fifth of the whole run's, and hardly
    any is in the format."""
    since = held_since(history, "clipped_ratio", lambda share: share >= 0.5)
    if since is None and at_most(history, "format", 0.01):
        cut = history.figures("clipped_ratio")
        since = history.steps[0]["step"] if cut and fmean(cut) >= 0.2 else None
    if since is None:
        return None
    return Finding(
        since,
        f"{percent(fmean(history.figures('clipped_ratio')))} of the completions are cut off",
        "a completion without an end has no answer to reward",
        capitalise(setting(history, "--max-completion-length", 2)),
    )


def no_format(history: History) -> Finding | None:
    """No completion in a hundred is in the format that the rewards pay for, or not one in twenty
    where nearly all groups are dead."""
    if history.settings.get("reward_set") == "none":
        return None
    enough = 0.05 if dead_since(history) else 0.01
    since = held_since(history, "format", lambda share: share < enough)
    if since is None or truncated(history):
        return None
    return Finding(
        since,
        "hardly any completion is in the format that was asked for",
        "what is never sampled cannot be rewarded",
        "Show it by --one-shot, ask for it in --system-prompt-file, or pay for a part of it by "
        "--reward",
    )


def no_reward(history: History) -> Finding | None:
    """Every reward function returned None for every completion of the last WINDOW steps."""
    steps = reversed(history.steps)
    silent = list(takewhile(lambda row: "reward" in row and row["reward"] is None, steps))
    if len(silent) < min(WINDOW, len(history.steps)):
        return None
    return Finding(
        silent[-1]["step"],
        "every reward function returned None for every completion",
        "None means that a reward does not apply",
        "Give a --reward that returns numbers for these problems, or --reward-set default",
    )


def constant_reward(history: History) -> Finding | None:
    """Every completion earns the same, and not because all are right or all wrong."""
    rewards = history.figures("reward")[-WINDOW:]
    since, correct = dead_since(history), history.recent("correct")
    if since is None or len(set(rewards)) > 1 or not rewards or rewards[0] == 0:
        return None
    paid = "correctness" in (history.steps[-1].get("rewards") or {})
    if paid and correct is not None and not 0.1 <= correct <= 0.9:
        return None
    return Finding(
        since,
        f"every completion earned {rewards[0]:g}",
        "a group whose rewards are alike has no advantages",
        "Give a --reward that tells completions apart; check_rewards.py shows what each pays",
    )


def too_hard(history: History) -> Finding | None:
    """Nearly all groups are dead, and nearly nothing is right."""
    since = dead_since(history)
    correct = history.recent("correct")
    if since is None or correct is None or correct >= 0.1 or constant_reward(history):
        return None
    if truncated(history) or no_format(history):
        return None
    return Finding(
        since,
        f"{dead(history)} of the groups are dead and {percent(correct)} of the completions right",
        "a group in which all are wrong has no advantages",
        f"Take easier problems (--dataset) or a larger --model, or "
        f"{setting(history, '--num-generations', 2)}",
    )


def too_easy(history: History) -> Finding | None:
    """Nearly all groups are dead, and nearly everything is right."""
    since = dead_since(history)
    correct = history.recent("correct")
    if since is None or correct is None or correct <= 0.9:
        return None
    return Finding(
        since,
        f"{dead(history)} of the groups are dead and {percent(correct)} of the completions right",
        "a group in which all are right has no advantages",
        "Take harder problems (--dataset), or leave it at that: more steps change nothing",
    )


def few_live_groups(history: History) -> Finding | None:
    """Nearly all groups are dead for no reason that another rule names."""
    since = dead_since(history)
    others = (no_reward, truncated, no_format, constant_reward, too_hard, too_easy)
    if since is None or any(rule(history) for rule in others):
        return None
    return Finding(
        since,
        f"{dead(history)} of the groups are dead",
        "a group whose rewards are alike has no advantages",
        f"{capitalise(setting(history, '--num-generations', 2))}, or sample on until enough groups "
        "differ (--dynamic-sampling)",
    )


def dead_since(history: History) -> int | None:
    return held_since(history, "frac_reward_zero_std", lambda share: share >= DEAD)


def dead(history: History) -> str:
    return percent(history.recent("frac_reward_zero_std"))


def at_most(history: History, name: str, bound: float) -> bool:
    """Return whether a figure's recent mean is known and not above a bound."""
    recent = history.recent(name)
    return recent is not None and recent <= bound


def at_least(history: History, name: str, bound: float) -> bool:
    """Return whether a figure's recent mean is known and reaches a bound."""
    recent = history.recent(name)
    return recent is not None and recent >= bound


# --- rewards that pay for something else ---


def wrong_gold(history: History) -> Finding | None:
    """Most groups agree on one answer, and it is hardly ever the gold one (the last 8 groups or
    more; agree: 60 % of the completions of a group give the same answer)."""
    groups = list(last_groups(history))
    if (
        len(groups) < 8
        or at_least(history, "correct", 0.05)
        or not at_least(history, "format", 0.5)
    ):
        return None
    agreed = [found for group in groups if (found := majority(group))]
    wrong = [(row, answer) for row, answer, correct in agreed if not correct]
    if len(wrong) < len(groups) / 2:
        return None
    row, answer = wrong[-1]
    return Finding(
        row["step"],
        f"in {len(wrong)} of {len(groups)} groups most completions agree on an answer that is "
        f"not the gold one, such as {answer!r} for {row['answer']!r} to {row['question'][:80]!r}",
        "either the gold answers are wrong or in another form, or the model is sure of mistakes",
        "Look at those problems, and at --answer-column and --decimal-separator",
    )


def last_groups(history: History) -> Iterator[list[Row]]:
    """Yield the groups of the last logged step: completions to one question, beside each other."""
    if history.completions:
        step = history.completions[-1]["step"]
        rows = [row for row in history.completions if row["step"] == step]
        for _, group in groupby(rows, key=lambda row: row["question"]):
            yield list(group)


def majority(group: list[Row]) -> tuple[Row, str, bool] | None:
    """Return a row of a group, the answer that 60 % or more of the group give, and whether it is
    right."""
    verdicts = [read_verdict(row) for row in group]
    answers = [verdict.answer for verdict in verdicts]
    common = max({answer for answer in answers if answer}, key=answers.count, default=None)
    if common is None or answers.count(common) < 0.6 * len(group):
        return None
    at = answers.index(common)
    return group[at], common, verdicts[at].correct


def reward_hacking(history: History) -> Finding | None:
    """The reward rises while right answers fall: those sampled by ten points or more, since a time
    when the reward was no higher than now, or those of the validations by more than two standard
    errors."""
    reward, correct = change(history, "reward"), change(history, "correct")
    if reward is None or not reward.rose:
        return None
    if (
        correct is not None
        and correct.fell
        and correct.best - correct.last >= 0.1
        and window_from(history, "reward", correct.best_step) <= reward.last
    ):
        since = correct.best_step
        fell = f"right answers fell from {percent(correct.best)} to {percent(correct.last)}"
    elif validated := validation_falls(history):
        since, fell = validated.since, validated.seen
    else:
        return None
    return Finding(
        since,
        f"the reward rose from {reward.first:.2f} to {reward.last:.2f} while {fell}",
        "the rewards pay more for something else than for the answer",
        "Read completions.jsonl, then lower that reward's weight (--reward FILE:FUNCTION=WEIGHT)",
    )


def drowned_reward(history: History) -> Finding | None:
    """One reward makes 95 % of the differences inside the groups, while that for the right answer
    differs in a tenth of them or more."""
    groups = [group for group in last_groups(history) if len(group) > 1]
    names = list(groups[0][0]["rewards"]) if groups else []
    if "correctness" not in names:
        return None
    spread = {
        name: [pvariance([row["rewards"][name] or 0.0 for row in group]) for group in groups]
        for name in names
    }
    total = sum(map(sum, spread.values()))
    loudest = max(names, key=lambda name: sum(spread[name]))
    alive = fmean(bool(one) for one in spread["correctness"])
    if loudest == "correctness" or alive < 0.1 or sum(spread[loudest]) < 0.95 * total:
        return None
    return Finding(
        groups[0][0]["step"],
        f"{loudest} makes {percent(sum(spread[loudest]) / total)} of the differences inside groups",
        "the advantages say next to nothing of the right answer",
        f"Lower its weight (--reward FILE:{loudest}=WEIGHT)",
    )


# --- the policy goes astray ---


def learning_rate_high(history: History) -> Finding | None:
    """Right answers fell to less than half, by more than noise, and the reward did not rise:
    against the best WINDOW steps, or the first step where that alone was better."""
    reward, correct = change(history, "reward"), change(history, "correct")
    if reward is None or correct is None or reward.rose:
        return None
    first = history.steps[0]
    groups, size = first.get("drawn_groups"), history.settings.get("num_generations")
    start = history.series("correct")[0][1]
    best, noise, since = correct.best, correct.noise, correct.best_step
    if groups and size and start > correct.best:
        # Completions of a group are alike, so that they count for half as many.
        best, noise, since = (
            start,
            (2 * start * (1 - start) / (groups * size)) ** 0.5,
            first["step"],
        )
    if best < 0.05 or correct.last > best / 2 or best - correct.last <= NOISE * noise:
        return None
    return Finding(
        since,
        f"right answers fell from {percent(best)} to {percent(correct.last)}",
        "steps that are too large undo what was learnt",
        f"{capitalise(setting(history, '--learning-rate', 0.1, 'lower'))} and start again",
    )


def length_runaway(history: History) -> Finding | None:
    """Completions are twice as long as at the start, and no more of them are right."""
    length, correct = change(history, "completion_length"), change(history, "correct")
    if length is None or length.last < 2 * length.first or (correct and correct.rose):
        return None
    return Finding(
        held_since(history, "completion_length", lambda tokens: tokens >= 2 * length.first),
        f"completions grew from {length.first:.0f} to {length.last:.0f} tokens, none more right",
        "something pays for length",
        "Look for it in the rewards, and keep the length penalty of --reward-set default",
    )


def length_collapse(history: History) -> Finding | None:
    """Completions have less than 40 % of their length at the start, and no more are right."""
    length, correct = change(history, "completion_length"), change(history, "correct")
    if length is None or length.last > 0.4 * length.first or (correct and correct.rose):
        return None
    return Finding(
        held_since(history, "completion_length", lambda tokens: tokens <= 0.4 * length.first),
        f"completions shrank from {length.first:.0f} to {length.last:.0f} tokens, none more right",
        "the reasoning disappears",
        "Look for what pays for short answers in the rewards",
    )


def entropy_collapse(history: History) -> Finding | None:
    """The entropy is under 5 % of what it was, and a tenth or more is still wrong.

    Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models": what can be gained is used up with the entropy.
    """
    entropy = change(history, "entropy")
    if entropy is None or at_least(history, "correct", 0.9) or entropy.last > 0.05 * entropy.first:
        return None
    return Finding(
        held_since(history, "entropy", lambda nats: nats <= 0.05 * entropy.first),
        f"the entropy fell from {entropy.first:.3f} to {entropy.last:.4f} nats per token",
        "completions of a group become alike, so that nothing new is tried",
        f"{capitalise(setting(history, '--epsilon-high', 1.2))}, "
        f"{setting(history, '--learning-rate', 0.3, 'lower')}, or "
        f"{setting(history, '--temperature', 1.2)}",
    )


def gradient_zero(history: History) -> Finding | None:
    """The gradient is exactly zero although groups differ in their rewards."""
    since = held_since(history, "grad_norm", lambda norm: norm == 0)
    if since is None or dead_since(history):
        return None
    masked = history.settings.get("mask_truncated_completions")
    return Finding(
        since,
        "the gradient is zero although the rewards of some groups differ",
        "nothing of those completions counts in the loss",
        "Do without --mask-truncated-completions or raise --max-completion-length"
        if masked
        else "Check that the adapter's parameters require gradients, and its --target-modules",
    )


def gradient_clipped(history: History) -> Finding | None:
    """The norm is ten times --max-grad-norm or more: every step is scaled to the same length."""
    limit = history.settings.get("max_grad_norm")
    since = limit and held_since(history, "grad_norm", lambda norm: norm >= 10 * limit)
    if not since:
        return None
    norm = history.recent("grad_norm")
    return Finding(
        since,
        f"the norm of the gradient is {norm:.2g}, {norm / limit:.0f} times --max-grad-norm",
        "each step is scaled to one length, so that a strong signal counts no more than a weak one",
        f"Raise --max-grad-norm to {2 * norm:.1g} (now {limit:g})",
    )


def kl_high(history: History) -> Finding | None:
    """The policy is a nat per token or more away from its reference."""
    since = held_since(history, "kl", lambda nats: nats >= 1)
    if since is None:
        return None
    return Finding(
        since,
        f"the KL from the reference is {history.recent('kl'):.1f} nats per token",
        "the policy has left what the base can write",
        f"{capitalise(setting(history, '--learning-rate', 0.3, 'lower'))}, or "
        f"{setting(history, '--beta', 3)}",
    )


def sampler_differs(history: History) -> Finding | None:
    """The log-probs of sampler and trainer differ by 0.1 nats per token or more, or their ratio is
    not 1 within a tenth.

    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    since = held_since(history, "sampler_logprob_difference", lambda nats: nats >= 0.1)
    since = since or held_since(history, "sampler_ratio", lambda ratio: abs(ratio - 1) > 0.1)
    if since is None:
        return None
    return Finding(
        since,
        "the engine that samples and the model that learns give different probabilities",
        "the update corrects for a distribution that nothing was sampled from",
        "Take --rollout generate, or one --dtype for both; report it, the adapter may not arrive",
    )


# --- the run as a whole ---


def learning_rate_low(history: History) -> Finding | None:
    """Three validations or more are alike to the last item, with groups to learn from."""
    found = [(row["strict_accuracy"], row["format_rate"]) for row in history.validations]
    rates = history.figures("learning_rate")
    too_small = len(rates) >= WINDOW and 0 < max(rates) < 1e-7
    alike = len(found) >= 3 and len(set(found)) == 1 and 0 < found[0][0] < 1
    if not (too_small or alike) or dead_since(history):
        return None
    if not any(history.figures("grad_norm")):
        return None
    return Finding(
        history.steps[0]["step"],
        f"{len(found)} validations gave the same accuracy and format to the last item"
        if alike
        else f"the learning rate is at most {max(rates):.0e}",
        "the adapter changes too little to change what the model says",
        f"{capitalise(setting(history, '--learning-rate', 10))}; LoRA wants 5e-6 to 1e-3",
    )


def validation_falls(history: History) -> Finding | None:
    """The last validation is worse than the best one by more than two standard errors."""
    if len(history.validations) < 2:
        return None
    best = max(history.validations, key=lambda row: (row["strict_accuracy"], row["step"]))
    last = history.validations[-1]
    high, low, count = best["strict_accuracy"], last["strict_accuracy"], last.get("num_items", 0)
    error = math.sqrt((high * (1 - high) + low * (1 - low)) / count) if count else math.inf
    if high - low <= max(0.05, 2 * error):
        return None
    return Finding(
        best["step"],
        f"validation fell from {percent(high)} at step {best['step']} to {percent(low)}",
        "the policy was best before the end",
        f"The adapter of step {best['step']} is the one that is kept; "
        f"{setting(history, '--learning-rate', 0.3, 'lower')} for a longer run",
    )


def within_noise(history: History) -> Finding | None:
    """The paired test does not tell the adapter from its base (p > 0.05)."""
    evaluation = history.evaluation
    if evaluation.get("mcnemar_p", 0) <= 0.05:
        return None
    base, adapter = (evaluation[model]["strict_accuracy"] for model in ("base", "adapter"))
    return Finding(
        history.steps[0]["step"],
        f"strict accuracy {percent(base)} before and {percent(adapter)} after on "
        f"{evaluation['num_items']} problems, p = {evaluation['mcnemar_p']:.2f}",
        "so small a difference arises by chance",
        f"{capitalise(setting(history, '--max-steps', 3))}, and evaluate on more problems "
        "(--num-eval-items)",
    )


# --- the machine ---


def slow_generation(history: History) -> Finding | None:
    """Generation takes 80 % of a step's time or more."""
    shares = [
        {"step": row["step"], "share": row["seconds_generate"] / row["seconds"]}
        for row in history.steps
        if row.get("seconds_generate") and row.get("seconds")
    ]
    since = held_since(History(shares), "share", lambda share: share >= 0.8)
    if since is None or dead_since(history):
        return None
    return Finding(
        since,
        f"generation takes {percent(fmean(row['share'] for row in shares[-WINDOW:]))} of the time",
        "it computes one token per completion at a time",
        "Give vLLM more memory (--vllm-gpu-memory-utilization)"
        if history.settings.get("rollout") == "vllm"
        else "Take --rollout vllm",
    )


def memory_creeps(history: History) -> Finding | None:
    """The peak memory grew three times or more in the second half of 20 steps or more, by 15 %."""
    series = history.series("peak_memory_bytes")
    second = series[len(series) // 2 :]
    grew = [after[0] for before, after in pairwise(second) if after[1] > before[1]]
    if len(series) < 20 or len(grew) < 3 or second[-1][1] < 1.15 * second[0][1]:
        return None
    return Finding(
        grew[0],
        f"the peak memory grew from {second[0][1] / 1e9:.2f} to {second[-1][1] / 1e9:.2f} GB",
        "longer completions, or a reward function that keeps what it was given",
        "Look at completion_length beside it; --gpu-memory keeps the plan under a limit",
    )


RULES: tuple[Rule, ...] = (
    *(not_finite, drowned_reward, learning_rate_high, kl_high, sampler_differs),
    *(length_runaway, length_collapse, reward_hacking, wrong_gold),
    *(no_reward, truncated, no_format, constant_reward, too_easy, too_hard, few_live_groups),
    *(entropy_collapse, gradient_zero, gradient_clipped),
    *(learning_rate_low, validation_falls, within_noise, slow_generation, memory_creeps),
)


def diagnose(history: History) -> list[Finding]:
    """Return what is wrong with a run so far, causes first; empty where nothing is."""
    found = [(rule.__name__, rule(history)) for rule in RULES if history.steps]
    return [replace(finding, rule=name) for name, finding in found if finding]
