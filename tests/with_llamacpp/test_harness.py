"""lm-evaluation-harness, a tool that is not ours, finds what scripts/evaluate.py finds, item by
item."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import build_messages, render
from lora_grpo.machine.backend import installed
from lora_grpo.policy.adapter import read_record
from lora_grpo.policy.base import EMBEDDED_FOLDER, load_tokenizer
from lora_grpo.policy.generate import Completion
from lora_grpo.results.scoring import judge
from lora_grpo.rewards.corpus import build_corpus
from lora_grpo.tasks.numbers import CANONICAL, NUMBER_WORDS, PER, SQUARED, read_quantity
from lora_grpo.tasks.task import NUMBER_TASK

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "docs/lm_eval"
LONGEST = "48"
FEW = ("--preset", "tiny", "--max-steps", "4", "--num-generations", "8", "--num-eval-items", "128")
FEW += ("--per-device-train-batch-size", "32", "--num-validation-items", "8")
FEW += ("--max-completion-length", LONGEST)
# What a template engine or a command line might take for its own.
OWN_PROMPT = NUMBER_TASK.system_prompt + '\nKeep {{ "braces" }}, commas, a=b and $HOME as they are.'

needs_harness = pytest.mark.skipif(
    not installed("lm_eval"), reason="lm-eval is not installed here; make test-llamacpp installs it"
)


def load(name: str) -> ModuleType:
    """Load a module by its path, as the harness does."""
    spec = importlib.util.spec_from_file_location(name, TASKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


number = load("number")
PIECES = [
    *"0123456789,./ -+$%kKMsmx^()\n\t",
    "\u2212",
    "\u00a3",
    "\u00b0",
    "\u00b2",
    "\u00a0",
    "\uff17",
]
PIECES += ["12", "1,200", "0.50", " per ", "each ", " million", "halves", "ths", " apples", "b"]
PIECES += [
    "\\frac",
    "{2}",
    "\u00bd",
    "e5",
    "10^",
    " km",
    " squared",
    "\u5143",
    " a",
    "\\text{",
    "}",
]
NUMBERS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)


def project_reads(text: str) -> tuple | None:
    found = read_quantity(text)
    return found and (found.value, found.unit, found.per)


@settings(max_examples=2_000, deadline=None)
@given(NUMBERS)
@example("9" * 101)
@example("1/0")
@example("$$0$")  # marks that do not pair
@example("$0$$")
@example("$$0$$")
@example("\u00bd3")
@example("$16$ cm^2")
def test_both_statements_of_the_number_rule_agree(text: str) -> None:
    assert number.read(text) == project_reads(text)


def test_both_know_the_same_words() -> None:
    named = {*NUMBER_WORDS, *CANONICAL, *number.NAMES, *number.REFUSED, *number.POWERS, "apples"}
    named |= {*SQUARED, *PER, "m", "L", "in"}
    words = {form for word in named for form in (word, f"{word}s", f"{word}ths", word.upper())}
    texts = {f"5{gap}{word}" for word in words for gap in (" ", "", "-", "/", " apples per ")}
    assert {text: number.read(text) for text in texts} == {t: project_reads(t) for t in texts}
    assert number.read("5 half") is None and number.read("5 km").unit == ("km", 1)


def test_the_number_rule_is_no_rule_that_accepts_or_refuses_all() -> None:
    read = {text: number.read(text) for text in ("-$1,200.00", "3/4 cups.", "7,2", "5k", "5x")}
    values = [None if found is None else float(found.value) for found in read.values()]
    assert values == [-1200.0, 0.75, None, 5000.0, None]


TAGGED = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "<answer", "answer>", "\n", "72"]
TAGGED += ["<answer>\n72\n</answer>", "<answer>$72.0 </answer>", "<answer>71</answer>", " "]
COMPLETIONS = st.lists(st.sampled_from(TAGGED), max_size=6).map("".join)


def harness_strict(completion: str, gold: str) -> bool:
    """Score a completion with the task file's own filters and metric."""
    from lm_eval.filters import build_filter_ensemble
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(TASKS / "lora_grpo_items.yaml")
    [text] = [completion]
    for step in config["filter_list"][0]["filter"]:
        keep = {key: value for key, value in step.items() if key != "function"}
        ensemble = build_filter_ensemble("strict", [[step["function"], keep]])
        [texts] = ensemble.filters[0]().apply([[text]], [{}])
        text = texts[0] if isinstance(texts, list) else texts
    return bool(config["metric_list"][0]["metric"](references=[gold], predictions=[text]))


def project_strict(completion: str, gold: str) -> bool:
    return judge(Problem(1, "", gold), Completion(completion, 1, False)).strict


@needs_harness
def test_both_strict_parsers_agree_on_tricky_completions() -> None:
    verdicts = set()
    for case in build_corpus():
        expected = project_strict(case.completion, case.answer)
        assert harness_strict(case.completion, case.answer) is expected, case.name
        verdicts.add(expected)
    assert verdicts == {True, False}


@needs_harness
@settings(max_examples=300, deadline=None)
@given(COMPLETIONS)
def test_both_strict_parsers_agree_on_any_tags(completion: str) -> None:
    assert harness_strict(completion, "72") is project_strict(completion, "72")


def run(*command: object, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def harness(home: Path, task: str, model_args: str, *flags: object) -> tuple[list[dict], dict]:
    """Run the harness as a user types it; return its items in order, and its figures."""
    output = home / "harness" / f"{len(list(home.glob('harness/*')))}"
    run(
        *("-m", "lm_eval", "--model", "hf", "--model_args", f"{model_args},dtype=float32"),
        *("--tasks", task, "--include_path", TASKS, "--apply_chat_template", "--log_samples"),
        *("--gen_kwargs", f"max_gen_toks={LONGEST}", "--device", "cpu", "--batch_size", 32),
        *("--output_path", output, *flags),
        home=home,
    )
    [samples], [results] = output.rglob("samples_*.jsonl"), output.rglob("results_*.json")
    rows = sorted(read_rows(samples), key=lambda row: row["doc_id"])
    return rows, json.loads(results.read_text())["results"][task]


def assert_same(rows: list[dict], figures: dict, items: list[dict], model: str) -> None:
    """The harness's completions, verdicts and accuracy are those of evaluate.py, which hold both
    right and wrong ones."""
    assert [row["resps"] for row in rows] == [[[item[model]["completion"]]] for item in items]
    strict = [item[model]["strict"] for item in items]
    assert [bool(row["same_number"]) for row in rows] == strict
    assert [bool(row["exact_match"]) for row in rows] == strict
    assert figures["same_number,strict"] == sum(strict) / len(strict)
    assert {*strict} == {True, False}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run, what evaluate.py makes of it, and GSM8K's layout in small."""
    home = tmp_path_factory.mktemp("home")
    run(ROOT / "scripts/train_lora.py", *FEW, "--run-name", "run", home=home)
    run(
        *(ROOT / "scripts/evaluate.py", "adapters/run", "--load-in-4bit", "False"),
        *("--output", "eval.json"),
        home=home,
    )
    (home / "gsm8k").mkdir()
    lines = [json.dumps(row) for row in generate_problems(96, "test", seed=5)]
    (home / "gsm8k/test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return home


@needs_harness
def test_the_adapter_scores_the_same(home: Path) -> None:
    items = read_rows(home / "eval_items.jsonl")
    rows, figures = harness(
        home, "lora_grpo_items", f"pretrained={EMBEDDED_FOLDER},peft=adapters/run"
    )
    assert_same(rows, figures, items, "adapter")
    assert any(item["base"]["completion"] != item["adapter"]["completion"] for item in items)


@needs_harness
def test_a_prompt_of_ones_own_arrives_whole(home: Path) -> None:
    records = home / "records"
    records.mkdir()
    saved = json.loads((home / "adapters/run/train_config.json").read_text())
    saved["system_prompt"] = OWN_PROMPT
    (records / "train_config.json").write_text(json.dumps(saved))
    shutil.copy(home / "eval_items.jsonl", records)
    rows, _ = harness(
        *(home, "lora_grpo_items", f"pretrained={EMBEDDED_FOLDER}"),
        *("--metadata", "records=records", "--limit", 4),
    )
    tokenizer, style = load_tokenizer(EMBEDDED_FOLDER), read_record(records).style
    assert [row["arguments"]["gen_args_0"]["arg_0"] for row in rows] == [
        render(tokenizer, build_messages(item["question"], style))
        for item in read_rows(records / "eval_items.jsonl")[:4]
    ]
    assert all(OWN_PROMPT in row["arguments"]["gen_args_0"]["arg_0"] for row in rows)


@needs_harness
def test_a_models_own_penalty_changes_neither(home: Path) -> None:
    model = shutil.copytree(EMBEDDED_FOLDER, home / "penalised")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 3.0}))
    rows, figures = harness(
        home, "lora_grpo_items", f"pretrained={model}", "--metadata", "records=adapters/run"
    )
    assert_same(rows, figures, read_rows(home / "eval_items.jsonl"), "base")


@needs_harness
def test_the_merged_folder_scores_the_same_on_a_folder_like_gsm8k(home: Path) -> None:
    run(ROOT / "scripts/merge_adapter.py", "adapters/run", home=home)
    run(
        *(ROOT / "scripts/evaluate.py", "--model", "merged/run", "--dataset", "gsm8k"),
        *("--max-completion-length", LONGEST, "--output", "gsm8k.json"),
        home=home,
    )
    rows, figures = harness(
        *(home, "lora_grpo_gsm8k", "pretrained=merged/run"),
        *("--metadata", "records=adapters/run", "gsm8k=gsm8k"),
    )
    items = read_rows(home / "gsm8k_items.jsonl")
    assert [row["doc"]["question"] for row in rows] == [item["question"] for item in items]
    assert_same(rows, figures, items, "base")


def test_a_run_that_is_not_there_or_was_asked_otherwise_is_refused(tmp_path: Path) -> None:
    problems = load("problems")
    with pytest.raises(FileNotFoundError, match=r"train_config\.json: add --metadata records=DIR"):
        problems.read_system_prompt({"pretrained": "some/model"})
    shown = {"system_prompt": "s", "example": {"question": "q", "answer": "1"}}
    (tmp_path / "train_config.json").write_text(json.dumps(shown))
    with pytest.raises(ValueError, match="one-shot"):
        problems.read_system_prompt({"records": str(tmp_path)})
