"""A card is valid metadata and whole Markdown, and says what the records say and no more."""

import contextlib
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from merge_models import ROOT, save_adapter

from lora_grpo.config.presets import PRESETS, parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PromptStyle, build_messages
from lora_grpo.machine.files import read_jsonl, write_jsonl
from lora_grpo.merge.command import MergeConfig, merge_adapter
from lora_grpo.policy.base import EMBEDDED_FOLDER
from lora_grpo.results.card import SAMPLE_MARKS, CardNote, write_adapter_card, write_model_card
from lora_grpo.results.scoring import Item, build_eval_items, build_evaluation
from lora_grpo.tasks.task import NUMBER_TASK

RIGHT = "<reasoning>\n2+3=5\n</reasoning>\n<answer>\n5\n</answer>"
QUESTION = "What is 2 + 3?"


def answer(right: bool, completion: str = RIGHT) -> Item:
    return Item(completion, right, True, right, False, 9)


def record_run(folder: Path, **changes) -> None:
    """Write the records of a run on two problems: the base fails both, the adapter one."""
    recorded = asdict(TrainConfig(**PRESETS["tiny"], preset="tiny", run_name="run"))
    recorded |= {"base_model": "tiny", "system_prompt": NUMBER_TASK.system_prompt}
    recorded |= {"example": None, "steps": 40}
    recorded |= {
        "warmup_steps": 0,
        "device": "cpu",
        "git_commit": "abc",
        "versions": {"trl": "1.2"},
    }
    recorded |= {"dataset_sha256": "d" * 64, "load_in_4bit": False, **changes}
    (folder / "train_config.json").write_text(json.dumps(recorded, default=str))


def record_steps(folder: Path) -> None:
    """Write the metrics and validations that the curves are drawn from."""
    rows = [{"step": n, "reward": n / 9, "correct": n / 9, "format": 1.0} for n in range(1, 4)]
    write_jsonl(folder / "metrics.jsonl", [{**row, "completion_length": 20.0} for row in rows])
    found = {"step": 2, "strict_accuracy": 0.5, "format_rate": 1.0}
    write_jsonl(folder / "validation.jsonl", [found])


def record_evaluation(folder: Path, question: str = QUESTION, completion: str = RIGHT) -> None:
    problems = [Problem(1, question, "5"), Problem(2, question, "6")]
    models = {
        "base": [answer(False), answer(False)],
        "adapter": [answer(True, completion), answer(False, completion)],
    }
    report = build_evaluation("arithmetic", "test", models) | {"best_step": 2}
    (folder / "eval.json").write_text(json.dumps(report))
    rows = build_eval_items(problems, models)
    write_jsonl(folder / "eval_items.jsonl", rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """An adapter that PEFT alone has written, with a tokenizer; not to be changed."""
    folder = save_adapter(tmp_path_factory.mktemp("plain") / "run", tiny_model_folder, std=0.002)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_model_folder / name, folder / name)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture
def run(plain: Path, tmp_path: Path) -> Path:
    """An adapter directory with a run's records, except those of its steps."""
    folder = shutil.copytree(plain, tmp_path / "run")
    record_run(folder)
    record_evaluation(folder)
    return folder


def card_of(folder: Path) -> ModelCard:
    if (folder / "adapter_config.json").is_file():
        write_adapter_card(folder)
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def headings(card: ModelCard) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def code_in(card: ModelCard, language: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(card.text)
    return [t.content for t in tokens if t.type == "fence" and t.info == language]


def test_the_model_index_is_what_was_measured(run: Path) -> None:
    card = card_of(run)
    data = card.data.to_dict()
    name, results = model_index_to_eval_results(data["model-index"])
    recorded = json.loads((run / "eval.json").read_text())["adapter"]
    assert name == "run"
    assert [result.metric_value for result in results] == [
        round(100 * recorded[key], 2)
        for key in ("strict_accuracy", "lenient_accuracy", "format_rate")
    ]
    low, high = (round(100 * bound, 2) for bound in recorded["ci95"])
    assert results[0].metric_args["ci95"] == [low, high]
    assert f"{low} to {high}" in results[0].metric_name
    assert (results[0].dataset_name, results[0].dataset_split) == ("arithmetic", "test")
    assert data["library_name"] == "peft" and data["language"] == ["en"]
    assert {"grpo", "lora"} <= set(data["tags"])
    assert ModelCard(str(card)).data.to_dict() == data
    assert data["widget"][0]["messages"] == build_messages(QUESTION)
    assert data["widget"][0]["output"]["text"] == RIGHT


def test_the_text_states_protocol_pairs_and_the_chosen_step(run: Path) -> None:
    record_steps(run)
    row = {"step": 2, "num_items": 40, "strict_accuracy": 0.5, "format_rate": 1.0}
    write_jsonl(run / "validation.jsonl", [row | {"step": 1}, row | {"ci95": [0.352, 0.648]}])
    text = card_of(run).text
    for said in (
        "2 problems of `arithmetic` (test)",
        "greedy decoding, one sample per problem",
        "p = 1. That is no evidence of a difference. The adapter solves 1 that the base does not",
        "by +50.0 points and lenient by +0.0",
        "step 2 of 40, the best on 40 validation problems: strict accuracy 50.0 %",
        "35.2 % to 64.8 %, the highest of 2",
    ):
        assert said in text, said
    metrics = read_jsonl(run / "metrics.jsonl")
    write_jsonl(run / "metrics.jsonl", [row | {"frac_reward_zero_std": 1.0} for row in metrics])
    text = card_of(run).text
    assert "nothing was learnt" in text and "the best on" not in text


def test_the_same_records_give_the_same_bytes(run: Path) -> None:
    record_steps(run)
    write_adapter_card(run)
    first = [(run / name).read_bytes() for name in ("README.md", "curves.png")]
    write_adapter_card(run)
    assert first == [(run / name).read_bytes() for name in ("README.md", "curves.png")]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    (run / "validation.jsonl").unlink()
    write_adapter_card(run)
    assert first[1] != (run / "curves.png").read_bytes()


def test_nothing_is_invented_for_a_plain_peft_directory(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "run")
    card = card_of(folder)
    assert headings(card) == ["run", "Use", "Files", "Licence", "Limits"]
    assert not (folder / "curves.png").exists()
    assert not {"model-index", "datasets", "widget", "license"} & card.data.to_dict().keys()
    assert card.data.tags == ["lora"]
    assert "system" not in "".join(code_in(card, "python") + code_in(card, "bash"))
    assert "No evaluation of it is on record." in card.text


def test_an_evaluation_of_one_model_is_not_the_adapters(run: Path) -> None:
    report = json.loads((run / "eval.json").read_text())
    del report["adapter"]
    (run / "eval.json").write_text(json.dumps(report))
    assert "Evaluation" not in headings(card_of(run))


def test_4_bit_and_dynamic_sampling_are_said_where_they_were_on(run: Path) -> None:
    plain = card_of(run).text
    record_run(run, load_in_4bit=True, dynamic_sampling=True)
    text = card_of(run).text
    for said in ("| `dynamic_sampling_rounds` | 3 |", "base held in 4-bit NF4", "may differ from"):
        assert said in text and said not in plain, said


def execute(source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(home)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "card", "exec"), {})
    return printed.getvalue().removesuffix("\n")


def answer_greedily(adapter: Path, base: Path, tokenizer, style: PromptStyle) -> str:
    """Answer the first question by this project's own prompt and policy."""
    from lora_grpo.data.prompt import render
    from lora_grpo.policy.base import Placement
    from lora_grpo.policy.open import open_policy

    prompt = render(tokenizer, build_messages(QUESTION, style))
    with open_policy(base, tokenizer, Placement("cpu", "bfloat16"), False, False, 8) as policy:
        policy.use_adapter(adapter)
        return policy.complete([prompt], 64, lambda count: None)[0].text


@pytest.mark.parametrize("where", ["embedded", "elsewhere"])
def test_the_peft_code_runs_and_answers_as_the_policy_does(
    run: Path, where: str, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = EMBEDDED_FOLDER
    if where == "elsewhere":
        base = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "my base")
    example = {"row": 1, "question": "What is 1 + 1?", "answer": "2", "solution": "1+1=2"}
    prompt = 'Say "so",\nthen ```\n<answer>'
    record_run(run, model=str(base), system_prompt=prompt, example=example)
    source = code_in(card_of(run), "python")[0]
    style = PromptStyle(prompt, Problem(**example))
    wanted = answer_greedily(run, base, tokenizer, style)
    assert "import lora_grpo." not in source and "from lora_grpo." not in source
    assert wanted and execute(source, tmp_path, monkeypatch) == wanted
    if where == "embedded":
        assert execute(source, run, monkeypatch) == wanted


def test_the_embedded_model_is_a_promised_name_without_torch() -> None:
    code = (
        "import sys; from lora_grpo import EMBEDDED_FOLDER as f; print(f, 'torch' in sys.modules)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert said.split() == [str(EMBEDDED_FOLDER), "False"]


def test_a_merged_folders_code_runs_and_its_card_claims_no_figures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_steps(run)
    write_adapter_card(run)
    folder = merge_adapter(MergeConfig(run, tmp_path / "new"), lambda line: None).folder
    card = card_of(folder)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and "model-index" not in data
    assert "Proof" in headings(card) and "under Proof" in card.text
    assert (folder / "curves.png").read_bytes() == (run / "curves.png").read_bytes()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        build_messages(QUESTION), add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    done = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
    wanted = tokenizer.decode(done, skip_special_tokens=True)
    assert wanted and execute(code_in(card, "python")[0], tmp_path, monkeypatch) == wanted


def test_the_command_makes_the_recorded_configuration(run: Path, monkeypatch) -> None:
    wanted = TrainConfig(**PRESETS["qwen3-0.6b"], preset="qwen3-0.6b", reward=("a.py:f=1",), seed=7)
    record_run(run, **json.loads(json.dumps(asdict(wanted), default=str)))
    command = shlex.split(code_in(card_of(run), "bash")[-1])
    assert command[:2] == ["lora-grpo", "train"]
    monkeypatch.chdir(run)
    made = asdict(parse_train_config(command[2:])[0])
    differs = {name for name, value in asdict(wanted).items() if made[name] != value}
    assert differs == {"config"}


def test_no_path_of_this_machine_is_published(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / "someone"
    shutil.copytree(EMBEDDED_FOLDER, home / "base")
    (home / "data.jsonl").write_text("")
    paths = {"model": f"{home}/base", "dataset": f"{home}/data.jsonl"}
    paths |= {"eval_dataset": f"{home}/gone.jsonl", "system_prompt_file": f"{home}/prompt.txt"}
    paths |= {"reward": [f"{home}/mine.py:short=0.5"], "adapters_dir": f"{home}/adapters"}
    record_run(run, base_model=f"{home}/base", config=f"{home}/c.yaml", **paths)
    report = json.loads((run / "eval.json").read_text()) | {"dataset": f"{home}/gone.jsonl"}
    (run / "eval.json").write_text(json.dumps(report))
    card = card_of(run)
    assert "someone" not in str(card) and str(tmp_path) not in str(card)
    for said in ("`base`", "`data.jsonl`", "| mine.py:short=0.5 |"):
        assert said in card.text
    assert not {"base_model", "datasets"} & card.data.to_dict().keys()
    write_model_card(home, run, CardNote("run, merged", "merged", "transformers", "run"))
    assert "someone" not in (home / "README.md").read_text()


@pytest.fixture
def hub_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub model in the local cache, without weights."""
    folder = tmp_path / "cache/models--owner--base/snapshots/0123abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_hub_base_and_its_own_licence(run: Path, hub_base: Path) -> None:
    (hub_base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-research\nlicense_link: LICENSE\n"
        "language: [en, no, fr]\n---\n"
    )
    record_run(run, model="owner/base", revision="0123abc", dataset="openai/gsm8k:main")
    card = card_of(run)
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "adapter")
    assert (data["license"], data["license_name"]) == ("other", "some-research")
    assert data["license_link"].endswith("/owner/base/blob/0123abc/LICENSE")
    assert data["datasets"] == ["openai/gsm8k"]
    assert data["language"] == ["en", "fr"]  # YAML reads a bare `no` as false
    python, served = code_in(card, "python")[0], code_in(card, "bash")[0]
    assert 'base = "owner/base"\n' in python and 'revision="0123abc"' in python
    assert "vllm serve owner/base --revision 0123abc" in served


@pytest.mark.parametrize(
    ("name", "text", "known", "said"),
    [
        ("LICENSE", "  Apache License\n  Version 2.0, January 2004\n", "apache-2.0", "its file"),
        ("LICENSE.md", "House rules | `x`", None, "LICENSE.md"),
        ("README.md", "---\nlicense: mit\n---\n", "mit", "card says"),
        ("README.md", "---\nlicense: [\n---\n", None, "not known"),
        ("README.md", "no metadata", None, "not known"),
        ("other.txt", "", None, "its page, https://huggingface.co/owner/base"),
    ],
)
def test_a_licence_is_read_and_never_assumed(
    run: Path, hub_base: Path, name: str, text: str, known: str | None, said: str
) -> None:
    (hub_base / name).write_text(text)
    record_run(run, model="owner/base", revision="0123abc")
    card = card_of(run)
    assert card.data.license == known
    assert said in card.text.partition("## Licence")[2]


def test_a_quantized_export_says_so(run: Path, hub_base: Path, tmp_path: Path) -> None:
    record_steps(run)
    record_run(run, model="owner/base", revision="0123abc")
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "run-q8_0.gguf").write_bytes(b"GGUF")
    note = CardNote("run, GGUF", "quantized", "gguf", "run", "A GGUF.", "Run it.", "Proven.")
    write_model_card(folder, run, note)
    data = card_of(folder).data.to_dict()
    assert data["library_name"] == "gguf" and "model-index" not in data
    assert data["base_model_relation"] == "quantized" and "quantized" in data["tags"]
    assert hashlib.sha256(b"GGUF").hexdigest() in (folder / "README.md").read_text()
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


HOSTILE = [
    "---\nlicense: mit\n---\n# Heading\n",
    "```\n# not code\n````text\n<script>alert(1)</script>",
    "a: b\n- c: 'd\" #e\t|f|\r\n~~~\n",
    "\x85next\u2028line",
    "<!-- open\n</details>\n| a | b |\n$x$ *y* [z](w)",
]
TEXT = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1),
)


@given(prompt=TEXT, completion=TEXT, dataset=TEXT)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_text_breaks_the_card(run: Path, prompt: str, completion: str, dataset: str) -> None:
    record_run(run, system_prompt=prompt, dataset=dataset.replace("/", " "), eval_dataset="x: y")
    record_evaluation(run, completion=completion)
    card = card_of(run)
    assert card.data.widget[0]["messages"][0]["content"] == prompt
    assert card.data.widget[0]["output"]["text"] == completion
    assert headings(card) == [
        *("run", "Use", "Prompt", "Evaluation", "Sample answers of the adapter", "Training"),
        *("Reproduce", "Files", "Licence", "Limits"),
    ]
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inner = [child for token in tokens for child in token.children or []]
    html = [token.content for token in [*tokens, *inner] if token.type.startswith("html")]
    assert [content.strip() for content in html] == list(SAMPLE_MARKS)
    written = [block.replace("\r\n", "\n") for block in code_in(card, "text")]
    assert written[0] == prompt.replace("\r\n", "\n") + "\n"
    assert written[2] == completion.replace("\r\n", "\n") + "\n"
    assert f'"content": {json.dumps(prompt, ensure_ascii=False)}' in code_in(card, "python")[0]
