"""Pushing to a Hub on this machine: what arrives, what is asked, and every fault by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ROOT, run_here, run_script
from hub_server import TOKEN, Fault, Handler, Hub, serve_hub
from huggingface_hub import HfApi, constants, hf_api
from huggingface_hub.utils import _http
from merge_models import make_adapter, make_base, save_adapter

from lora_grpo.deploy import hub_remote
from lora_grpo.deploy.hub import PushConfig, push_to_hub
from lora_grpo.deploy.hub_files import PushError, PushRefused

REPO = "me/run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub of our own, plain HTTP uploads, and no waiting between huggingface_hub's retries."""
    from huggingface_hub import _commit_api

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_commit_api, "is_xet_available", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def adapter() -> Path:
    """A small adapter with a run's records, a checkpoint and another step's weights."""
    folder = make_adapter(device="cpu")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# run\n")
    (folder / "eval.json").write_text(json.dumps({"dataset": "/home/somebody/data.jsonl"}))
    (folder / "completions.jsonl").write_text('{"step": 1}\n' * 1000)
    for name in ("checkpoint-5/optimizer.pt", "last/adapter_model.safetensors", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not to be published")
    return folder


def push(
    hub: Hub, adapter: Path, token: str | None = TOKEN, said: list[str] | None = None, **flags
) -> list[str]:
    """Push, and return what was said, which `said` takes even where the push fails."""
    said = [] if said is None else said
    config = PushConfig(adapter, **{"repo": REPO, **flags})
    push_to_hub(config, HfApi(endpoint=hub.url, token=token), said.append)
    return said


def test_a_push_arrives_whole_and_private(hub: Hub, adapter: Path) -> None:
    said = push(hub, adapter)
    held = hub.repositories[REPO]
    files = held.commits[-1]
    assert held.private and len(held.commits) == 2
    assert (
        files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    )
    assert {"adapter_config.json", "tokenizer.json", "README.md", "completions.jsonl"} <= set(files)
    assert not [
        name for name in files if "checkpoint" in name or "last" in name or "hidden" in name
    ]
    assert said[-1] == f"done: {hub.url}/{REPO}"
    assert TOKEN not in "".join(said)


def test_no_byte_that_is_sent_holds_a_path(hub: Hub, tmp_path: Path) -> None:
    """An adapter trained elsewhere, with PEFT's own card, and everything that is made of it."""
    place = tmp_path / "my models"
    base = Path(shutil.copytree(make_base(), place / "base é"))
    adapter = save_adapter(place / "runs" / "a run", base)
    data = place / "data.jsonl"
    data.write_text("{}\n")
    for name, text in {
        "README.md": f"\nTrained on `{data}` and /workspace/data/other.jsonl in ~/runs/a.\n",
        "completions.jsonl": json.dumps({"prompt": f"a\n{data}", "completion": "/no_think 1/2/3"}),
        "eval.json": json.dumps({"dataset": "../a/b.jsonl", "command": f"--dataset {data}"}),
        "report.html": f"<p>{data}</p><a href='https://example.com/a/b'>/x</a>",
    }.items():
        kept = (adapter / name).read_text() if name == "README.md" else ""
        (adapter / name).write_text(kept + text)
    assert str(place) in (adapter / "README.md").read_text()
    said = push(hub, adapter, merged=True, gguf=("q8_0",))
    assert sum(line.startswith("done") for line in said) == 3
    again = push(hub, adapter, merged=True, gguf=("q8_0",))
    assert sum("nothing to send" in line for line in again) == 3
    sent = {
        f"{repo}/{name}": content
        for repo, held in hub.repositories.items()
        for name, content in held.commits[-1].items()
    }
    made = {"-merged/merge_report.json", "-GGUF/export_report.json", "-GGUF/a-run-Q8_0.gguf"}
    assert {REPO + name for name in made} <= set(sent), sorted(sent)
    private = (str(tmp_path), "my models", str(Path.home()) + "/", "/workspace", "../", "~/")
    forms = {text.encode() for path in private for text in (path, json.dumps(path)[1:-1])}
    assert not [(name, form) for name, content in sent.items() for form in forms if form in content]
    card = sent[f"{REPO}/README.md"].decode()
    merged = sent[f"{REPO}-merged/README.md"].decode()
    assert f'"{REPO}-merged")' in merged and "OWNER" not in merged
    assert "base_model" not in card and "Trained on `data.jsonl` and other.jsonl in a." in card
    assert b"https://example.com/a/b" in sent[f"{REPO}/report.html"]
    assert json.loads(sent[f"{REPO}/completions.jsonl"])["completion"] == "/no_think 1/2/3"


def test_a_file_that_is_no_text_and_holds_a_path_is_refused(hub: Hub, adapter: Path) -> None:
    (adapter / "curves.png").write_bytes(b"x" * (1 << 20) + str(adapter).encode())
    with pytest.raises(ValueError, match=r"curves\.png holds .*run, a path of this machine"):
        push(hub, adapter)
    assert not hub.repositories


def test_only_what_changed_is_sent_and_without_asking_where_a_push_wrote_it(
    hub: Hub, adapter: Path
) -> None:
    push(hub, adapter)
    uploads = hub.count("PUT /lfs/")
    said = push(hub, adapter)
    assert "nothing to send" in said[-2] and said[-1].startswith("done")
    assert len(hub.repositories[REPO].commits) == 2
    (adapter / "README.md").write_text("another card\n")
    said = push(hub, adapter)
    assert hub.repositories[REPO].commits[-1]["README.md"] == b"another card\n"
    assert any("1 of" in line for line in said) and hub.count("PUT /lfs/") == uploads


def test_a_file_of_somebody_else_is_replaced_only_when_agreed(hub: Hub, adapter: Path) -> None:
    push(hub, adapter)
    held = hub.repositories[REPO]
    held.commits.append({**held.commits[-1], "README.md": b"edited on the website"})
    with pytest.raises(PushRefused, match=r"replace README\.md in me/run.*add --yes"):
        push(hub, adapter)
    assert held.commits[-1]["README.md"] == b"edited on the website"
    push(hub, adapter, yes=True)
    assert held.commits[-1]["README.md"].startswith(b"---")


def test_public_is_asked_for(hub: Hub, adapter: Path) -> None:
    with pytest.raises(PushRefused, match=r"make the new repository me/run public.*add --yes"):
        push(hub, adapter, public=True)
    assert REPO not in hub.repositories
    push(hub, adapter)
    with pytest.raises(PushRefused, match="make the private repository me/run public"):
        push(hub, adapter, public=True)
    assert hub.repositories[REPO].private
    push(hub, adapter, public=True, yes=True)
    assert not hub.repositories[REPO].private
    with pytest.raises(PushRefused, match=r"is public already.*add --public"):
        push(hub, adapter)


FAULTS = {
    "name taken": ("POST repos/create", Fault(409, "You already"), r"me/run \(409 You already"),
    "not my namespace": ("POST repos/create", Fault(403, "no rights"), "may not write to me/run"),
    "too many requests": ("POST preupload", Fault(429, "", {"Retry-After": "17"}), "17 seconds"),
    "quota": ("POST objects/batch", Fault(403, "storage limit reached"), "takes no more for me/"),
    "too large": ("PUT /lfs/", Fault(413, "too large"), "takes no more for me/run"),
    "cut in the middle of a file": ("PUT /lfs/", Fault(cut=True), "the connection broke off"),
    "server error at the commit": ("POST /commit/", Fault(500), r"the Hub failed \(500\)"),
    "changed by somebody else": ("POST /commit/", Fault(412, "not the head"), "somebody else"),
    "server error at the listing": ("GET /tree/", Fault(503), r"the Hub failed \(503\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_sentence_and_the_next_push_sends_the_rest(
    name: str, hub: Hub, adapter: Path
) -> None:
    part, fault, sentence = FAULTS[name]
    hub.faults[part] = fault
    said: list[str] = []
    with pytest.raises(PushError, match=sentence):
        push(hub, adapter, said=said)
    assert not [line for line in said if line.startswith("done")]
    assert hub.count(" ") < 100, "it kept asking"
    hub.faults.clear()
    arrived, uploads = len(hub.objects), hub.count("PUT /lfs/")
    assert push(hub, adapter)[-1] == f"done: {hub.url}/{REPO}"
    assert hub.count("PUT /lfs/") - uploads == len(hub.objects) - arrived
    assert arrived > 0 or "/commit/" not in part


def flip(files: dict[str, bytes]) -> None:
    data = bytearray(files["adapter_model.safetensors"])
    data[-1] ^= 1
    files["adapter_model.safetensors"] = bytes(data)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("adapter_model.safetensors", flip),
        ("tokenizer.json", lambda files: files.pop("tokenizer.json")),
        ("README.md", lambda files: files.update({"README.md": b"x"})),
    ],
)
def test_what_the_hub_lost_is_noticed_before_it_is_public(name, spoil, hub, adapter) -> None:
    hub.spoil = spoil
    with pytest.raises(PushError, match=f"not hold what was sent, {name} differs or is missing"):
        push(hub, adapter, public=True, yes=True)
    assert hub.repositories[REPO].private


def test_a_token_that_is_unknown_or_may_only_read(hub: Hub, adapter: Path) -> None:
    with pytest.raises(PushError, match="does not know the token"):
        push(hub, adapter, token="hf_wrong")
    hub.role = "read"
    with pytest.raises(PushError, match="'mine' of me may only read"):
        push(hub, adapter)
    assert not hub.repositories


def test_a_merge_of_another_adapter_is_refused_and_all_is_asked_first(
    hub: Hub, adapter: Path
) -> None:
    push(hub, adapter, merged=True)
    held = hub.repositories[f"{REPO}-merged"]
    held.commits.append({**held.commits[-1], "config.json": b"{}"})
    (adapter / "completions.jsonl").write_text("{}\n")
    with pytest.raises(PushRefused, match=r"replace config\.json in me/run-merged"):
        push(hub, adapter, merged=True)
    assert len(hub.repositories[REPO].commits) == 2
    other = make_adapter(device="gpu")
    weights = other / "adapter_model.safetensors"
    *same, last = weights.read_bytes()
    weights.write_bytes(bytes([*same, last ^ 1]))
    requests = len(hub.requests)
    with pytest.raises(ValueError, match="merged/run was not made from"):
        push(hub, other, merged=True)
    assert len(hub.requests) == requests


def test_a_no_leaves_the_repository_private(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(hub, adapter)
    held = hub.repositories[REPO]
    held.commits.append({**held.commits[-1], "README.md": b"edited on the website"})
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: "y" if "public" in question else "n")
    with pytest.raises(PushRefused, match=r"replace README\.md.*was no"):
        push(hub, adapter, public=True)
    assert held.private


def test_a_hub_that_makes_it_public_gets_no_file(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Handler.create
    monkeypatch.setattr(
        Handler, "create", lambda self, asked: create(self, {**asked, "visibility": "public"})
    )
    with pytest.raises(PushError, match="public though private was asked for"):
        push(hub, adapter)
    assert len(hub.repositories[REPO].commits) == 1 and hub.count("PUT /lfs/") == 0


def test_a_system_prompt_and_the_parent_folder_are_no_paths(hub: Hub, adapter: Path) -> None:
    record = json.loads((adapter / "train_config.json").read_text())
    record |= {"system_prompt": "/no_think a/b/c", "dataset": "/home/somebody/data.jsonl"}
    record["adapters_dir"] = "../"
    (adapter / "train_config.json").write_text(json.dumps(record))
    push(hub, adapter)
    sent = json.loads(hub.repositories[REPO].commits[-1]["train_config.json"])
    assert sent["system_prompt"] == record["system_prompt"] and sent["dataset"] == "data.jsonl"


def test_a_silent_hub_is_left(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the request and never answers; huggingface_hub alone would wait for ever."""
    monkeypatch.setattr(hub_remote, "TIMEOUT", 0.3)
    silence, route = threading.Event(), Handler.route

    def say_nothing(self: Handler, path: str) -> None:
        if "tree" in path:
            silence.wait(20)
        route(self, path)

    monkeypatch.setattr(Handler, "route", say_nothing)
    with pytest.raises(PushError, match="the connection broke off"):
        push(hub, adapter)
    assert not silence.is_set()
    silence.set()


def test_ctrl_c_in_the_middle_of_a_file(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    reached, route = threading.Event(), Handler.route

    def hold(self: Handler, path: str) -> None:
        if path.startswith("/lfs/"):
            reached.set()
            time.sleep(1)
        route(self, path)

    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    settings["HF_HOME"] = str(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "route", hold)
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "push_to_hub.py", adapter, "--repo", REPO],
            cwd=tmp_path,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert reached.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: run it again" in err
    assert "Traceback" not in err and "done" not in out
    done = run_script("push_to_hub.py", adapter, "--repo", REPO, home=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"done: {hub.url}/{REPO}"
    assert TOKEN not in out + err + done.stdout + done.stderr
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}


def test_a_dry_run_needs_no_hub_and_no_token(adapter: Path, tmp_path: Path) -> None:
    flags = ("--repo", REPO, "--gguf", "q8_0", "--dry-run")
    done = run_here("push_to_hub.py", adapter, *flags, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "me/run (private): " in done.stdout and "library_name: peft" not in done.stdout
    assert "me/run-GGUF (private): exports/run-gguf-q8_0, which the push makes" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "adapter_config.json" in line]
    assert lines and all("without local paths" in line for line in lines)
    size = f"{os.stat(adapter / 'adapter_model.safetensors').st_size:,}"
    assert f"{size}  adapter_model.safetensors" in done.stdout
    assert list(tmp_path.iterdir()) == []


CARD_WITH_SAMPLES = (
    "# run\n\n<!-- samples -->\n## Sample answers of the adapter\n\nSecret 1\n"
    "<!-- end of samples -->\n## Proof\nSecret 2\n<!-- end of samples -->\n\n## Training\nkept\n"
)


def test_samples_are_named_and_left_out_when_asked(hub: Hub, adapter: Path) -> None:
    """Also those in the card, where a completion may hold the mark that ends them."""
    (adapter / "README.md").write_text(CARD_WITH_SAMPLES)
    own = ("completions.jsonl", "report.html", "README.md")
    (adapter / "report.html").write_text("Secret 3")
    (dry,) = (line for line in push(hub, adapter, dry_run=True) if "data of your own" in line)
    (sent,) = (line for line in push(hub, adapter) if "data of your own" in line)
    assert dry.strip() == sent.partition(": ")[2] and "--no-samples" in sent
    assert all(name in sent for name in own) and "Secret" not in sent
    said = push(hub, adapter, repo="me/other", samples=False)
    files = hub.repositories["me/other"].commits[-1]
    assert not {"completions.jsonl", "report.html"} & set(files)
    assert files["README.md"] == b"# run\n\n## Training\nkept\n"
    assert not any("--no-samples" in line for line in said)
    (still,) = (line for line in push(hub, adapter, samples=False) if "still holds" in line)
    assert "completions.jsonl, report.html" in still
    (adapter / "README.md").write_text(CARD_WITH_SAMPLES.replace("<!--", "<!"))
    with pytest.raises(ValueError, match=r"README\.md has a section .*--no-samples"):
        push(hub, adapter, samples=False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"repo": "run"}, "--repo run is no repository name: give you/name"),
        ({"repo": "me/a--b"}, "--repo me/a--b is no repository name"),
        ({"repo": "me/" + "a" * 90}, "is no repository name"),
        ({"repo": REPO, "gguf": ("q3",)}, "--gguf q3: allowed are f16"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, said, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        PushConfig(tmp_path, **flags)


def test_the_token_has_no_flag(adapter: Path, tmp_path: Path) -> None:
    flags = ("--repo", REPO, "--token", "hf_x")
    assert run_here("push_to_hub.py", adapter, *flags, home=tmp_path).returncode == 2


def test_without_a_token_or_a_network(hub: Hub, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr(hf_api, "get_token", lambda: None)
    with pytest.raises(PushError, match="no Hub token was found: run `hf auth login`"):
        push(hub, adapter, token=None)
    hub.url = "http://127.0.0.1:9"
    with pytest.raises(PushError, match="the Hub cannot be reached"):
        push(hub, adapter)


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not an adapter directory"):
        push_to_hub(PushConfig(tmp_path, REPO))
