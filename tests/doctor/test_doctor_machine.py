"""Python, memory, disk and the Hub: what stops a run, what warns, and what is never shown."""

import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_grpo.doctor.machine import (
    Row,
    disk_row,
    hub_rows,
    machine_rows,
    memory_row,
    python_row,
    supported_python,
)

ROOT = Path(__file__).parents[2]
MODEL = "owner/name"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.server.heads.append(self.path)
        self.send_response(503 if "down" in self.path else 200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """A Hub of its own that answers HEAD, and 503 below /down."""
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.heads = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return tmp_path / "hub"


def put_model(cache: Path) -> None:
    """Put a model of 0.75 GiB, all hole, into a cache, laid out as the Hub's client does."""
    repository = cache / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots/c0ffee").mkdir(parents=True)
    with (repository / "blobs/1").open("wb") as blob:
        blob.truncate(3 * 2**28)
    (repository / "snapshots/c0ffee/config.json").symlink_to(repository / "blobs/1")


def test_every_fact_of_this_machine_has_its_row(tmp_path: Path) -> None:
    rows = machine_rows(tmp_path / "adapters")
    assert [row.name for row in rows] == ["python", "os", "cpu", "ram", "disk"]
    assert all(row.section == "machine" and row.value for row in rows)
    assert "cores" in rows[2].value and "GiB available of" in rows[3].value


def test_python_is_compared_with_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(supported_python().split(",")) == set(project["requires-python"].split(","))
    for version, status in {(3, 10): "problem", (3, 11): "ok", (3, 12): "ok"}.items():
        assert python_row(version, ">=3.11,<3.13").status == status
    late = python_row((3, 13), "<3.13,>=3.11")
    assert late.status == "problem" and "python3.11 -m venv .venv" in late.advice
    assert python_row((3, 13), "").status == "ok"


def test_little_memory_stops_a_run() -> None:
    assert memory_row(3 * 2**30).status == "ok"
    short = memory_row(2**30)
    assert short.status == "problem" and short.value.startswith("1.0 GiB available of")
    assert short.advice.startswith("close other programs")


def test_a_disk_that_is_full_or_closed_stops_a_run(tmp_path: Path) -> None:
    adapters = tmp_path / "not" / "yet" / "adapters"
    assert disk_row(adapters).status == "ok"
    assert list(tmp_path.iterdir()) == []
    full = disk_row(adapters, least=2**80)
    assert full.status == "problem" and "--adapters-dir" in full.advice
    (tmp_path / "file").write_text("")
    for closed in (tmp_path / "file", Path("/proc/adapters")):
        row = disk_row(closed)
        assert row.status == "problem" and "cannot be written" in row.value


def test_a_hub_that_answers(server: HTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    hub, token, cache = hub_rows(MODEL, endpoint)
    assert hub.status == "ok" and hub.value.startswith(f"{endpoint} answers in ")
    assert server.heads == ["/"]
    assert (hub.name, token.name, cache.name) == ("hub", "token", "cache")
    down = hub_rows(MODEL, f"{endpoint}/down")[0]
    assert down.status == "warning" and "HTTP status 503" in down.value and down.advice


def test_a_hub_out_of_reach_stops_only_a_run_that_needs_it(own_cache: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    without = hub_rows(None, nowhere)[0]
    assert (
        without.status == "warning" and f"{nowhere} does not answer: ConnectError" in without.value
    )
    missing = hub_rows(MODEL, nowhere)[0]
    assert missing.status == "problem" and "--preset tiny" in missing.advice
    assert "HF_ENDPOINT" in missing.advice
    put_model(own_cache)
    cached = hub_rows(MODEL, nowhere)[0]
    assert cached.status == "warning" and "owner/name is in the cache" in cached.value


def test_offline_by_choice_asks_nobody(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub = hub_rows(MODEL, f"http://127.0.0.1:{server.server_port}")[0]
    assert hub.status == "problem" and hub.value.startswith("not asked: HF_HUB_OFFLINE is set")
    assert server.heads == []


def test_the_cache_counts_a_linked_blob_once(own_cache: Path, server: HTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    assert hub_rows(None, endpoint)[2].value.startswith("0.0 GiB in ")
    put_model(own_cache)
    assert hub_rows(None, endpoint)[2].value.startswith(
        f"0.8 GiB in {own_cache} (1 models and datasets)"
    )


def test_only_the_presence_of_a_token_is_told(
    server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert hub_rows(None, endpoint)[1].value.startswith("none: ")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert hub_rows(None, endpoint)[1] == Row("hub", "token", "present")
