"""Call a user's reward: for all completions at once, or for each alone, several at a time.

Scores are in the order of the completions, whichever call ends first. All async functions run on
one event loop, as a client that is kept from call to call must; plain ones run in threads that end
with the process, so that Ctrl-C never waits for them.
"""

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, SupportsFloat

from lora_grpo.machine.terminal import FailedError

Completion = str | list[dict[str, Any]]
LONGEST_SHOWN = 300
WAKE_SECONDS = 0.5
LOGGERS = ("log_extra", "log_metric")  # TRL's, which number calls in the order they come


class RewardError(FailedError):
    """A user's reward function raised; the message shows the completion that it was given."""


class NotScored(Exception):
    """Raise this in a reward that is called for one completion at a time (`--reward-workers`) to
    leave the completion out of the step; `TimeoutError` does the same."""


@dataclass(frozen=True)
class Calls:
    """How rewards are called: `workers` None is one call for all completions, a number that many
    calls at once, for one completion each; `timeout` is in seconds per such call."""

    workers: int | None = None
    timeout: float | None = None


def to_texts(completions: list[Completion]) -> list[str]:
    """Return each completion's text; a conversational one is a list whose last message counts."""
    return [text if isinstance(text, str) else text[-1]["content"] for text in completions]


class OwnReward:
    """A user's function as a reward of TRL's; its errors and wrong results name it and stop the
    run.

    `left_out` holds why completions of the last call got no score, by their position.
    """

    def __init__(self, name: str, function: Callable[..., Any], calls: Calls) -> None:
        self.name = self.__name__ = name  # by which TRL logs it
        self.function, self.calls = function, calls
        self.left_out: dict[int, str] = {}

    def __call__(self, completions: list[Completion], **columns: Any) -> list[float | None]:
        """Return one score per completion, None where the reward does not apply or did not come.

        Raises:
            RewardError: the function raised; says on which completion.
            ValueError: it returned something else than one number or None per completion.
        """
        texts, self.left_out = to_texts(completions), {}
        if self.calls.workers is None:
            return self._call_for_all(texts, columns)
        return self._call_for_each(texts, columns)

    def _call_for_all(self, texts: list[str], columns: dict[str, Any]) -> list[float | None]:
        def call(texts: list[str], columns: dict[str, Any]) -> Any:
            found = self.function(completions=texts, **columns)
            return wait_for(found) if inspect.iscoroutine(found) else found

        try:
            values = call(texts, columns)
        except Exception as error:
            if len(texts) == 1 and isinstance(error, (NotScored, TimeoutError)):
                return self._leave_out(0, error)
            raise self._failed(error, find_culprit(call, texts, columns)) from error
        return check_values(self.name, values, len(texts))

    def _call_for_each(self, texts: list[str], columns: dict[str, Any]) -> list[float | None]:
        logs: list[list[Callable[[], None]]] = [[] for _ in texts]
        calls = []
        for index, text in enumerate(texts):
            row = columns_of(columns, index, len(texts))
            for name in LOGGERS:
                if name in columns:
                    row[name] = partial(keep_call, logs[index], columns[name])
            calls.append(partial(self.function, completions=[text], **row))
        values: list[float | None] = []
        for index, outcome in enumerate(wait_for(self._run(calls))):
            if isinstance(outcome, (NotScored, TimeoutError)):
                values += self._leave_out(index, outcome)
            elif isinstance(outcome, BaseException):
                raise self._failed(outcome, shown(texts[index])) from outcome
            else:
                values += check_values(self.name, outcome, 1)
                for log in logs[index]:
                    log()
        return values

    async def _run(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """Return what each call returned, or the exception that it raised."""
        free = asyncio.Semaphore(self.calls.workers)
        start = attempt if is_async(self.function) else in_thread

        async def run(call: Callable[[], Any]) -> Any:
            async with free:
                try:
                    return await asyncio.wait_for(start(call), self.calls.timeout)
                except TimeoutError as error:
                    return error

        return await asyncio.gather(*map(run, calls))

    def _leave_out(self, index: int, error: BaseException) -> list[None]:
        limit = self.calls.timeout
        late = f"no score within {limit:g} s" if limit else "it gave up"
        self.left_out[index] = str(error) or late
        return [None]

    def _failed(self, error: BaseException, culprit: str) -> RewardError:
        return RewardError(
            f"reward {self.name!r} raised {describe_error(error)}, on {culprit}: mend the function "
            "(it gets completions as plain strings)"
        )


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a function, or a callable object, is `async def`."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of all rewards, which runs in a thread of its own.

    TRL has one too, but a trainer's: a client that the check before training had opened would
    belong to another loop.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return a coroutine's result; an interruption cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())
    try:
        # A signal that comes just before this thread sleeps is handled only when it wakes.
        while not future.done():
            wait([future], WAKE_SECONDS)
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def attempt(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Return what an async call returns, or the exception that it raises."""
    try:
        return await call()
    except Exception as error:
        return error


async def in_thread(call: Callable[[], Any]) -> Any:
    """Return what a plain call returns, or the exception that it raises, from a new thread.

    A call that is waited for no longer goes on there, to no effect.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # a SystemExit, too, would leave the waiting side alone
            future.set_result(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    return await asyncio.wrap_future(future)


def keep_call(kept: list[Callable[[], None]], call: Callable[..., None], *args: Any, **more: Any):
    """Keep a call for later, in the order of the completions."""
    kept.append(partial(call, *args, **more))


def columns_of(columns: dict[str, Any], index: int, total: int) -> dict[str, Any]:
    """Return one completion's part of the columns; what is no column stays as it is."""
    return {
        key: [value[index]] if isinstance(value, list) and len(value) == total else value
        for key, value in columns.items()
    }


def describe_error(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if frame.filename != __file__ and frame.filename[0] != "<"]
    where = f" at {Path(users[-1].filename).name}:{users[-1].lineno}" if users else ""
    reason = f" ({error})" if str(error) else ""
    return f"{type(error).__name__}{reason}{where}"


def shown(text: str) -> str:
    return f"the completion {text!r:.{LONGEST_SHOWN}}"


def find_culprit(call: Callable[..., Any], texts: list[str], columns: dict[str, Any]) -> str:
    """Return the first completion that fails on its own too, or say that only the batch fails."""
    for index, text in enumerate(texts):
        try:
            call([text], columns_of(columns, index, len(texts)))
        except Exception:
            return shown(text)
    return f"a batch of {len(texts)}, the first completion {texts[0]!r:.{LONGEST_SHOWN}}"


def check_values(name: str, values: Any, expected: int) -> list[float | None]:
    if not isinstance(values, Iterable) or isinstance(values, str | dict):
        raise ValueError(
            f"reward {name!r} must return a list of numbers, one per completion, got {values!r:.60}"
        )
    listed = list(values)
    if len(listed) != expected:
        raise ValueError(
            f"reward {name!r} returned {len(listed)} values for {expected} completions: "
            "return exactly one per completion, None where the reward does not apply"
        )
    for value in listed:
        number = value is None or (isinstance(value, SupportsFloat) and math.isfinite(float(value)))
        if not number:
            raise ValueError(
                f"reward {name!r} returned {value!r:.60}: "
                "return a finite number, or None where the reward does not apply"
            )
    return [None if value is None else float(value) for value in listed]
