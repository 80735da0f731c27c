"""The example's judge grades over HTTP: the embedded model, served by scripts/serve.py."""

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from types import ModuleType

import pytest

from lora_grpo.data.prompt import render
from lora_grpo.deploy.serve import TRANSFORMERS_NEEDS
from lora_grpo.machine.backend import installed
from lora_grpo.policy.base import choose_placement, load_base, load_tokenizer
from lora_grpo.policy.generate import complete
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.rewards.calls import Calls, RewardError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "judge_reward.py"
KEY = "sk-a-secret-of-mine"
QUESTIONS = ["3 + 4", "What is 1 + 2?", "What is 3 + 4?", "What is 6 + 6?"]


@pytest.fixture(scope="module")
def address(tiny_model_folder: Path) -> Iterator[str]:
    if missing := [name for name in TRANSFORMERS_NEEDS if not installed(name)]:
        pytest.skip(f"{', '.join(missing)} not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "scripts/serve.py", str(tiny_model_folder), "--port", port]
    command += ["--server", "transformers"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        end = monotonic() + 120
        while monotonic() < end and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def load_judge(monkeypatch: pytest.MonkeyPatch, url: str, model: str):
    """The example as --reward loads it, with a prompt that the embedded model can answer."""
    monkeypatch.setenv("JUDGE_BASE_URL", url)
    monkeypatch.setenv("JUDGE_MODEL", model)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    [reward] = build_rewards("none", (f"{EXAMPLE}:judge",), calls=Calls(2, 60.0))
    module: ModuleType = sys.modules[reward.function.function.__module__]
    module.client.cache_clear()
    monkeypatch.setattr(module, "PROMPT", "{question}")
    return reward.function


def test_the_grade_is_the_served_model_s(
    address: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = load_judge(monkeypatch, address, tiny_model_folder.name)
    grades = judge(["x"] * len(QUESTIONS), question=QUESTIONS, answer=["7"] * len(QUESTIONS))
    tokenizer = load_tokenizer(tiny_model_folder)
    prompts = [render(tokenizer, [{"role": "user", "content": each}]) for each in QUESTIONS]
    model = load_base(tiny_model_folder, choose_placement(), False)
    replies = [done.text for done in complete(model, tokenizer, prompts, 256, 1)]
    numbers = [float(reply.replace("</answer>", "").split()[-1]) for reply in replies]
    assert grades == [number / 10 if number <= 10 else None for number in numbers]
    assert None in grades and set(grades) != {None}
    assert set(judge.left_out.values()) == {"the judge's reply held no grade from 0 to 10"}


def test_a_wrong_model_stops_the_run_and_no_message_holds_the_key(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = load_judge(monkeypatch, address, "no-such-model-here")
    with pytest.raises(RewardError, match="reward 'judge' raised") as caught:
        judge(["x"], question=["3 + 4"], answer=["7"])
    assert KEY not in str(caught.value)


def test_a_judge_that_is_down_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        judge = load_judge(monkeypatch, url, "any")
        assert judge(["x"], question=["3 + 4"], answer=["7"]) == [None]
    assert judge.left_out == {0: "the judge failed with APIConnectionError"}


def test_a_missing_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load_judge(monkeypatch, "", "any")
    with pytest.raises(RewardError, match="environment variable JUDGE_BASE_URL is not set"):
        judge(["x"], question=["3 + 4"], answer=["7"])
    assert asyncio.iscoroutinefunction(judge.function)
