"""Slow rewards: plain and async, one completion at a time, with a time limit; what is late or given
up is left out, and nothing depends on which call ends first."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.rewards.builtin import Reward, left_out, try_rewards
from lora_grpo.rewards.calls import Calls, NotScored, OwnReward, RewardError

ROOT = Path(__file__).parents[2]
TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
LENGTHS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
KINDS = pytest.mark.parametrize("kind", ["plain", "async"])


def reward(kind: str, score, workers: int | None = None, timeout: float | None = None) -> OwnReward:
    """A reward of `score(text, columns) -> (seconds to wait, value)`, plain or async."""

    def plain(completions, **columns):
        found = [score(text, columns) for text in completions]
        time.sleep(sum(seconds for seconds, _ in found))
        return [value for _, value in found]

    async def slow(completions, **columns):
        found = [score(text, columns) for text in completions]
        await asyncio.sleep(sum(seconds for seconds, _ in found))
        return [value for _, value in found]

    return OwnReward("judge", plain if kind == "plain" else slow, Calls(workers, timeout))


@KINDS
@pytest.mark.parametrize("workers", [None, 1, 2, 6])
def test_scores_are_in_order_whichever_call_ends_first(kind: str, workers: int | None) -> None:
    """Each completion gets its own columns; what is no column reaches all."""

    def score(text, columns):
        if workers:
            assert columns["answer"] == [str(len(text))]
        assert columns["trainer_state"] == "state"
        return (7 - len(text)) * 0.01, float(len(text))

    answers = [str(len(text)) for text in TEXTS]
    judge = reward(kind, score, workers)
    assert judge(TEXTS, answer=answers, trainer_state="state") == LENGTHS
    assert judge.left_out == {}


@KINDS
def test_as_many_calls_as_workers_run_at_once(kind: str) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    def plain(completions, **columns):
        count(1)
        time.sleep(0.03)
        count(-1)
        return [1.0]

    async def slow(completions, **columns):
        count(1)
        await asyncio.sleep(0.03)
        count(-1)
        return [1.0]

    judge = OwnReward("judge", plain if kind == "plain" else slow, Calls(3))
    assert judge(TEXTS * 2) == [1.0] * 12
    assert most == 3


@KINDS
def test_a_late_score_is_none_and_the_others_are_there(kind: str) -> None:
    started = time.perf_counter()
    judge = reward(kind, lambda text, _: (20 if len(text) in (2, 5) else 0, 1.0), 2, 0.3)
    assert judge(TEXTS) == [1.0, None, 1.0, 1.0, None, 1.0]
    assert time.perf_counter() - started < 10
    assert judge.left_out == dict.fromkeys((1, 4), "no score within 0.3 s")
    assert judge(["a"]) == [1.0] and judge.left_out == {}


@KINDS
@pytest.mark.parametrize("error", [NotScored("no verdict"), TimeoutError("no verdict")])
def test_a_reward_can_give_up_on_a_completion(kind: str, error: Exception) -> None:
    def score(text, columns):
        if text == "bb":
            raise error
        return 0, 1.0

    judge = reward(kind, score, 2)
    assert judge(TEXTS[:3]) == [1.0, None, 1.0]
    assert judge.left_out == {1: "no verdict"}
    together = reward(kind, score)
    assert together(["bb"]) == [None]
    with pytest.raises(RewardError, match=r"raised .*no verdict.*the completion 'bb'"):
        together(TEXTS)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("async", ZeroDivisionError("mine")),
        ("plain", ZeroDivisionError("mine")),
        ("plain", StopIteration()),  # neither may be lost in a thread
        ("plain", SystemExit(3)),
    ],
)
def test_an_error_names_the_first_completion_that_fails(kind: str, error: BaseException) -> None:
    """In the order of the completions; another one fails first here."""

    def score(text, columns):
        if len(text) in (3, 6):
            time.sleep(0.1 if len(text) == 3 and kind == "plain" else 0)
            raise error
        return 0, 1.0

    name = type(error).__name__
    with pytest.raises(RewardError, match=f"'judge' raised {name}.* on the completion 'ccc'"):
        reward(kind, score, 6)(TEXTS)


@KINDS
def test_a_wrong_result_of_one_call_says_why(kind: str) -> None:
    judge = reward(kind, lambda text, _: (0, "much" if text == "bb" else 1.0), 2)
    with pytest.raises(ValueError, match="reward 'judge' returned 'much'"):
        judge(TEXTS)


def test_async_calls_are_on_one_loop_from_the_check_to_the_last_step() -> None:
    loops = set()

    async def judge(completions, **columns):
        loops.add(asyncio.get_running_loop())
        return [1.0] * len(completions)

    for calls in (Calls(), Calls(2), Calls(3, 5.0)):
        OwnReward("judge", judge, calls)(TEXTS)
    assert len(loops) == 1


def test_what_a_reward_logs_is_in_the_order_of_the_completions() -> None:
    logged = []

    def judge(completions, log_metric, **columns):
        time.sleep(0.05 / len(completions[0]))
        log_metric("length", len(completions[0]))
        if len(completions[0]) == 2:
            raise NotScored
        return [1.0]

    def log_metric(name, value):
        logged.append((name, value))

    OwnReward("judge", judge, Calls(6))(TEXTS, log_metric=log_metric)
    assert logged == [("length", length) for length in (1, 3, 4, 5, 6)]


def test_a_reward_that_scores_nothing_stops_before_training() -> None:
    judge = Reward("judge", reward("async", lambda text, _: (20, 1.0), 3, 0.05), sha256="x")
    with pytest.raises(RewardError, match=r"'judge' did not score 3 of 3 .*--reward-timeout"):
        try_rewards([judge], [Problem(1, "How many?", "72")])
    judge.function.left_out = {1: "no score within 5 s"}
    assert left_out([judge], 4) == (
        {1},
        [
            "reward 'judge' did not score 1 of 4 completions, which are left out of the step: no "
            "score within 5 s"
        ],
    )


@KINDS
def test_an_interruption_ends_a_process_that_waits_for_a_reward(kind: str) -> None:
    """Also a plain function, whose thread nothing can end."""
    define, wait = ("async def", "await asyncio") if kind == "async" else ("def", "time")
    code = (
        "import asyncio, time\n"
        "from lora_grpo.rewards.calls import Calls, OwnReward\n"
        f"{define} judge(completions, **columns):\n"
        "    print('called', flush=True)\n"
        f"    {wait}.sleep(600)\n"
        "OwnReward('judge', judge, Calls(2))(['a', 'b', 'c'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline().startswith(b"called"), "two workers may print at once"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and b"KeyboardInterrupt" in errors
