"""Runs an OpenAI-compatible server for an adapter or a merged model, in the foreground.

What can go wrong is refused before the server starts; it is watched until it answers, and ended
with everything it started when the person ends this.
"""

import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

from tyro.conf import Positional, arg

POLL_SECONDS = 0.5
ANSWER_SECONDS = 5
# How long each of the three signals has to end the server.
GRACE = {signal.SIGINT: 20, signal.SIGTERM: 10, signal.SIGKILL: 10}
# Processes that outlive the server by a moment still give shared memory back.
CHILDREN_SECONDS = 5

say = partial(print, flush=True)


@dataclass(frozen=True)
class ServeConfig:
    """Serve an adapter with its base, or a merged model, over the OpenAI API.

    An adapter is served on the base's whole weights, also where it was trained on 4-bit ones.
    """

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """An adapter directory such as adapters/<run>, or a merged model such as merged/<run>."""
    server: Literal["auto", "vllm", "transformers"] = "auto"
    """What serves; auto is vLLM where it is installed, else transformers, which serves merged
    models only."""
    model: str | None = None
    """Base to put the adapter on; by default the one that it remembers."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, without a password."""
    port: int = 8000
    """Port to listen on."""
    server_args: str = ""
    """More flags for the server, as one string: --server-args='--max-model-len 4096'."""
    dry_run: bool = False
    """Print the command and the request, and start nothing."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port must be from 1 to 65535, got {self.port}")
        try:
            shlex.split(self.server_args)
        except ValueError as error:
            raise ValueError(
                f"--server-args {self.server_args!r} cannot be split into flags ({error}): close "
                "the quotes in it"
            ) from None

    @property
    def address(self) -> str:
        """Where a client on this machine finds the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def serve(config: ServeConfig, report: Callable[[str], None] = say) -> int:
    """Serve until interrupted; return 0 then, and 1 if the server ended by itself.

    Raises:
        FileNotFoundError, ValueError, OSError: it cannot be served; nothing was started.
    """
    from lora_grpo.chat_source import find_source
    from lora_grpo.serve_command import build_request, build_service, choose_server, curl_line

    source = find_source(config.folder, config.model, script="serve.py")
    server = choose_server(config.server, source)
    service = build_service(source, server, config.host, config.port, config.server_args)
    request = curl_line(config.address, build_request(source, service))
    report(service.line)
    if config.dry_run:
        report(request)
        return 0
    check_port(config.host, config.port)
    try:
        with running(list(service.command), service.environment) as process:
            if not wait_until_ready(process, f"{config.address}/health"):
                report(f"the server ended with status {process.returncode} before it answered")
                return 1
            report(f"\nserving {service.model} at {config.address}/v1, Ctrl-C ends it. Try:")
            report(request)
            status = process.wait()
    except KeyboardInterrupt:
        report("ended")
        return 0
    report(f"the server ended by itself with status {status}")
    return 1


def check_port(host: str, port: int) -> None:
    """Raise an OSError, in one sentence, unless a server may listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise OSError(
                f"--host {host} is no address ({error.strerror}): use 127.0.0.1, or 0.0.0.0 for "
                "every address of this machine"
            ) from None
        except OSError as error:
            raise OSError(
                f"cannot listen on --host {host} --port {port} ({error.strerror}): choose another "
                "--port, or end what listens there"
            ) from None


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server while the block runs; a SIGTERM to this process ends both as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, interrupt)
    # A session of its own: Ctrl-C reaches this process alone, which then ends the whole session.
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        end(process)
        signal.signal(signal.SIGTERM, before)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it started: first asked, then told, then made to.

    A second Ctrl-C only brings the next signal sooner.
    """
    for number, seconds in GRACE.items():
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(seconds)
    with suppress(ProcessLookupError, KeyboardInterrupt):
        for _ in range(round(CHILDREN_SECONDS / POLL_SECONDS)):
            os.killpg(process.pid, 0)  # raises once none is left
            time.sleep(POLL_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen[bytes], health: str) -> bool:
    """Return whether the server answers, or False once it has ended; a model may take long to
    load."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        with suppress(urllib.error.URLError, OSError), direct.open(health, timeout=ANSWER_SECONDS):
            return True
        time.sleep(POLL_SECONDS)
    return False
