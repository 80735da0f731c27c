"""The command that serves, the curl line that it prints, and how a server starts and ends. The
servers that are installed run for real."""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from merge_models import change_json, make_adapter, make_base, save_adapter

from lora_grpo.data.prompt import PromptStyle, build_messages, render
from lora_grpo.deploy import serve as serve_module
from lora_grpo.deploy.serve import (
    TRANSFORMERS_NEEDS,
    ServeConfig,
    build_request,
    build_service,
    check_port,
    choose_server,
    curl_line,
    end,
    serve,
    wait_until_ready,
)
from lora_grpo.deploy.source import find_source
from lora_grpo.machine.backend import installed
from lora_grpo.policy.base import choose_placement, load_base, load_tokenizer
from lora_grpo.policy.generate import complete

STYLE = PromptStyle("Don't hurry:\n<reasoning>")
QUESTION = 'What\'s 3 + 4, in "digits"? $HOME `id`'
LENGTH = 12


def record(folder: Path) -> None:
    """Write the records of a run into an adapter or a merged folder."""
    saved = {"model": str(make_base()), "system_prompt": STYLE.system_prompt, "example": None}
    saved |= {"revision": None, "max_completion_length": LENGTH, "load_in_4bit": True}
    (folder / "train_config.json").write_text(json.dumps(saved))
    row = {"index": 0, "question": QUESTION, "answer": "7"}
    (folder / "eval_items.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def adapter() -> Path:
    folder = make_adapter()
    record(folder)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A whole model whose own file would sample, and punish repetition."""
    folder = tmp_path_factory.mktemp("merged") / "run"
    shutil.copytree(tiny_model_folder, folder)
    record(folder)
    wild = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 5.0}
    change_json(folder / "generation_config.json", **wild)
    return folder


def has(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(serve_module, "installed", lambda name: name in packages)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_service(source, **flags):
    return build_service(ServeConfig(source.folder, **flags), source, "vllm")


def flag(service, name: str) -> str:
    return service.command[service.command.index(name) + 1]


def test_vllm_serves_base_and_adapter_under_names_of_their_own(adapter) -> None:
    source = find_source(adapter)
    service = make_service(source, port=8001, server_args="--max-model-len 256")
    assert str(make_base()) in service.command and "--enable-lora" in service.command
    module = json.loads(flag(service, "--lora-modules"))
    assert module == {"name": "run", "path": str(adapter)}
    assert (flag(service, "--served-model-name"), service.model) == ("base", "run")
    assert flag(service, "--max-lora-rank") == "8"
    assert flag(service, "--port") == "8001" and flag(service, "--max-model-len") == "256"
    assert json.loads(flag(service, "--override-generation-config"))["temperature"] == 0
    assert json.loads(flag(service, "--default-chat-template-kwargs")) == {"enable_thinking": False}
    assert Path(flag(service, "--chat-template")).parent == adapter
    assert shlex.split(service.line) == service.command


def test_an_adapter_called_base_does_not_hide_behind_it(adapter) -> None:
    named = adapter.rename(adapter.with_name("base"))
    service = make_service(find_source(named))
    assert json.loads(flag(service, "--lora-modules"))["name"] == "adapter" == service.model


def test_the_rank_is_that_of_the_largest_module(adapter) -> None:
    change_json(adapter / "adapter_config.json", rank_pattern={"q_proj": 100})
    service = make_service(find_source(adapter))
    assert flag(service, "--max-lora-rank") == "128"
    change_json(adapter / "adapter_config.json", r=1000)
    with pytest.raises(ValueError, match="has rank 1000, and vLLM serves adapters of up to 512"):
        make_service(find_source(adapter))


def test_vllm_is_refused_where_it_would_not_stop_at_the_end_of_a_turn(tmp_path) -> None:
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    adapter = save_adapter(tmp_path / "run", base)
    make_service(find_source(adapter))
    for name, key, value in (
        ("config.json", "eos_token_id", 0),
        ("generation_config.json", "eos_token_id", 0),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        change_json(base / name, **{key: value})
    with pytest.raises(ValueError, match=r"ends a turn with '<\|im_end\|>'.*merge_adapter\.py"):
        make_service(find_source(adapter))


def test_what_is_installed_decides_who_serves(adapter, merged, monkeypatch) -> None:
    both = [find_source(adapter), find_source(merged)]
    has(monkeypatch, "vllm")
    assert [choose_server("auto", source) for source in both] == ["vllm", "vllm"]
    has(monkeypatch, *TRANSFORMERS_NEEDS)
    assert choose_server("auto", both[1]) == "transformers"
    with pytest.raises(ValueError, match=r"vllm is not installed, and .*merge_adapter.py .*/run, "):
        choose_server("auto", both[0])
    with pytest.raises(ValueError, match="--server vllm: the package vllm is not installed"):
        choose_server("vllm", both[1])
    has(monkeypatch, "vllm", "fastapi")
    with pytest.raises(ValueError, match=r"^transformers' own server serves whole models"):
        choose_server("transformers", both[0])
    with pytest.raises(ValueError, match=r"pip install -c constraints\.txt uvicorn openai$"):
        choose_server("transformers", both[1])


def test_the_curl_line_survives_the_shell(adapter) -> None:
    source = find_source(adapter)
    body = build_request(source, make_service(source))
    line = curl_line("http://127.0.0.1:8000", body)
    echoed = subprocess.run(
        ["sh", "-c", f'curl() {{ printf "%s\\0" "$@"; }}; {line}'], capture_output=True, check=True
    ).stdout.decode()
    address, *_, sent = echoed.split("\0")[:-1]
    assert address == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(sent) == {
        "model": "run",
        "messages": build_messages(QUESTION, STYLE),
        "max_tokens": LENGTH,
        "temperature": 0,
    }


def test_a_dry_run_prints_both_commands_and_starts_nothing(merged, monkeypatch) -> None:
    has(monkeypatch, *TRANSFORMERS_NEEDS)
    monkeypatch.setattr(serve_module, "subprocess", None)  # to start a server would fail
    said: list[str] = []
    assert serve(ServeConfig(merged, dry_run=True, port=8123), said.append) == 0
    command, request = said
    assert command.startswith(f"cd {merged.parent} && ") and " serve run " in command
    assert "--port 8123" in command
    assert request.startswith("curl http://127.0.0.1:8123/v1/chat/completions ")


def test_a_port_in_use_is_refused_before_anything_starts(merged, monkeypatch) -> None:
    has(monkeypatch, *TRANSFORMERS_NEEDS)
    monkeypatch.setattr(serve_module, "subprocess", None)  # to start a server would fail
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"--port {port} .*in use"):
            serve(ServeConfig(merged, port=port), lambda line: None)
    check_port("127.0.0.1", port)


def test_wrong_flags() -> None:
    with pytest.raises(ValueError, match="--port must be from 1 to 65535, got 0"):
        ServeConfig(Path("run"), port=0)
    with pytest.raises(ValueError, match=r"--server-args .* cannot be split"):
        ServeConfig(Path("run"), server_args="--a 'b")
    with pytest.raises(OSError, match=r"--host 300\.1\.1\.1 --port"):
        check_port("300.1.1.1", free_port())
    assert ServeConfig(Path("run"), host="0.0.0.0").address == "http://127.0.0.1:8000"
    assert ServeConfig(Path("run"), host="::", port=9).address == "http://[::1]:9"


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)


def test_a_server_that_dies_is_not_waited_for() -> None:
    process = start("raise SystemExit(3)")
    assert not wait_until_ready(process, f"http://127.0.0.1:{free_port()}/health")
    end(process)
    assert process.returncode == 3


def test_a_server_that_will_not_end_is_ended_with_its_children(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(serve_module, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(serve_module, "CHILDREN_SECONDS", 0.1)
    process = start(
        "import signal, subprocess, sys, time; "
        "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)",
        str(tmp_path / "pid"),
    )
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    end(process)
    assert process.returncode == -signal.SIGKILL
    child = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end(process)  # a second time does nothing


@pytest.mark.parametrize("server", ["transformers", "vllm"])
def test_the_printed_curl_line_gets_the_greedy_answer(merged, server, monkeypatch) -> None:
    """A person asks by the printed line, then presses Ctrl-C."""
    needs = TRANSFORMERS_NEEDS if server == "transformers" else ("vllm",)
    if missing := [name for name in needs if not installed(name)]:
        pytest.skip(f"{', '.join(missing)} not installed")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "1")
    model, tokenizer = load_base(merged, choose_placement(), False), load_tokenizer(merged)
    prompt = render(tokenizer, build_messages(QUESTION, STYLE))
    (expected,) = complete(model, tokenizer, [prompt], LENGTH, batch_size=1)
    port, answers = free_port(), []

    def ask(line: str) -> None:
        if line.startswith("curl "):
            answers.append(subprocess.run(["sh", "-c", line], capture_output=True, timeout=60))
            raise KeyboardInterrupt

    few = "--max-model-len 512" if server == "vllm" else ""
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert serve(ServeConfig(merged, server=server, port=port, server_args=few), ask) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    choice = json.loads(answers[0].stdout)["choices"][0]
    assert choice["message"]["content"].strip() == expected.text.strip() != ""
    assert (choice["finish_reason"] == "length") is expected.truncated
    check_port("127.0.0.1", port)  # the server is gone


def test_an_adapter_without_weights_is_refused(adapter) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        serve(ServeConfig(adapter))
