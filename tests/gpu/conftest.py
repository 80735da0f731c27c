"""GPU tests skip, each with its reason, where the machine lacks what they need.

A test says so by `@pytest.mark.needs("vllm", "qwen2.5-0.5b-random", ...)`; a GPU is always needed.
torch is not imported here: tests run scripts and workers in processes of their own, since unsloth
must come before trl, and a process holds one vLLM engine.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.register_assert_rewrite("gpu_machine", "trained_runs")

import gpu_machine  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): packages, models or GB that a test needs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            needs = [need for marker in item.iter_markers("needs") for need in marker.args]
            reason = next(filter(None, map(gpu_machine.lacks, ("gpu", *needs))), None)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs, logs and figures go: `GPU_OUT`, where an earlier stage's runs are, or anew."""
    folder = os.environ.get("GPU_OUT")
    path = Path(folder).resolve() if folder else tmp_path_factory.mktemp("gpu")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def figure(out: Path) -> Callable[..., None]:
    """Keep a figure: `figure(name, value, unit)`."""
    return partial(gpu_machine.keep_figure, out)
