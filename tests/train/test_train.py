"""The job: an adapter directory that is whole, and that a kill at any moment cannot change."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from killed_runs import SMALL, finish, kill_at, lines_of, start, there
from run_directory import contents, read_rows

from lora_grpo.config.files import read_run
from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.train import command as job


@pytest.fixture(scope="module")
def whole_run(children, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    home = tmp_path_factory.mktemp("whole")
    finish(children, home / "outcome", **SMALL, adapters_dir=home, run_name="run")
    return home / "run"


def test_a_finished_run_says_so_and_is_left_as_it_is(whole_run: Path, capsys) -> None:
    before = contents(whole_run)
    config, why = parse_train_config(["--resume", str(whole_run)])
    assert job.run(config, why) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"--resume {whole_run} --max-steps 12" in told and "strict accuracy" in told
    assert contents(whole_run) == before


MOMENTS = {
    "the directory has just appeared": (there("train_config.json"), 0.0),
    "the base is being evaluated": (there("train_config.json"), 0.3),
    "the first step was logged": (lines_of("metrics.jsonl", 1), 0.0),
    "a checkpoint is being written": (there(".staged-checkpoint-*"), 0.0),
    "a step after the checkpoint is sampled": (lines_of("metrics.jsonl", 3), 0.05),
    "the second validation was logged": (lines_of("validation.jsonl", 2), 0.0),
    "old checkpoints are being removed": (there("checkpoint-6"), 0.0),
    "the last adapter was saved": (there("last/adapter_model.safetensors"), 0.0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_changes_nothing(children, whole_run: Path, tmp_path: Path, moment: str) -> None:
    reached, delay = MOMENTS[moment]
    run, outcome = tmp_path / "run", tmp_path / "outcome"
    process = start(children, outcome, **SMALL, adapters_dir=tmp_path, run_name="run")
    kill_at(process, lambda: reached(run), delay)
    finish(children, outcome, resume=run)
    assert contents(run) == contents(whole_run)


def test_sigterm_saves_and_the_rest_is_the_same(children, whole_run: Path, tmp_path: Path) -> None:
    run, outcome = tmp_path / "run", tmp_path / "outcome"
    process = start(children, outcome, **SMALL, adapters_dir=tmp_path, run_name="run")
    while not lines_of("metrics.jsonl", 3)(run):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert outcome.read_text() == "SIGTERM"
    assert (run / "checkpoint-4").is_dir() and not (run / "eval.json").exists()
    finish(children, outcome, resume=run)
    assert contents(run) == contents(whole_run)


def test_a_prolonged_run_equals_one_that_was_long_from_the_start(
    children, whole_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "prolonged")
    outcome = tmp_path / "outcome"
    finish(children, outcome, resume=tmp_path / "prolonged", max_steps=8)
    long = {**SMALL, "max_steps": 8}
    finish(children, outcome, **long, adapters_dir=tmp_path, run_name="prolonged-2")
    found, wanted = contents(tmp_path / "prolonged"), contents(tmp_path / "prolonged-2")
    assert found.pop("card").replace("prolonged", "") == wanted.pop("card").replace(
        "prolonged-2", ""
    )
    assert found == wanted
    assert json.loads((tmp_path / "prolonged/train_config.json").read_text())["max_steps"] == 8


def test_two_updates_a_batch_resume_at_a_batch(children, tmp_path: Path) -> None:
    settings = {**SMALL, "num_iterations": 2, "max_completion_length": 8, "run_name": "run"}
    whole, parts, outcome = tmp_path / "whole", tmp_path / "parts", tmp_path / "outcome"
    finish(children, outcome, **settings, adapters_dir=whole)
    process = start(children, outcome, **settings, adapters_dir=parts)
    kill_at(process, lambda: lines_of("metrics.jsonl", 5)(parts / "run"), 0.0)
    finish(children, outcome, resume=parts / "run")
    assert contents(parts / "run") == contents(whole / "run")


COLUMNS_REWARD = """
def told(completions, question, answer, prompts, mixed, nested, some, row, image, **columns):
    for index in range(len(completions)):
        number = int(question[index].split()[-1])
        wanted = [number, str(number)][number % 2], {"of": [number, "x"]}
        assert (mixed[index], nested[index]) == wanted and answer[index] == str(number)
        assert some[index] == (number if number % 3 == 0 else None)
        assert (row[index], image[index]) == (-number, f"{number}.png")
        assert prompts[index][-1]["content"] == question[index]
    assert "prompt" not in columns and columns["max_completion_length"] == [1] * len(completions)
    assert "trainer_state" not in columns or not isinstance(columns["trainer_state"], list)
    # Groups of an even answer are dead, so that others are drawn in their place.
    return [float(index % 2 and int(gold) % 2) for index, gold in enumerate(answer)]
"""


def test_a_resumed_run_draws_the_same_groups_and_gives_rewards_the_same_columns(
    children, tmp_path: Path
) -> None:
    """Columns that Arrow cannot hold together, and that have names of TRL's own or of ours."""
    rows = [
        {
            "question": f"What is {number}",
            "answer": f"easy #### {number}",
            "mixed": [number, str(number)][number % 2],
            "nested": {"of": [number, "x"]},
            "row": -number,
            "image": f"{number}.png",
            "prompt": "not the question",
            "max_completion_length": 1,
            **dict.fromkeys(("completions", "trainer_state", "log_extra", "completion_ids"), "own"),
            **({"some": number} if number % 3 == 0 else {}),
        }
        for number in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(COLUMNS_REWARD)
    settings = {
        **SMALL,
        "dataset": str(tmp_path / "rows.jsonl"),
        "reward": (f"{tmp_path}/mine.py:told",),
        "num_generations": 2,
        "dynamic_sampling": True,
        "max_completion_length": 8,
        "run_name": "run",
    }
    whole, parts, outcome = tmp_path / "whole", tmp_path / "parts", tmp_path / "outcome"
    finish(children, outcome, **{**settings, "max_steps": 4}, adapters_dir=whole)
    finish(children, outcome, **{**settings, "max_steps": 2}, adapters_dir=parts)
    finish(children, outcome, resume=parts / "run", max_steps=4)
    assert contents(parts / "run") == contents(whole / "run")
    drawn = [row["drawn_groups"] for row in read_rows(whole / "run/metrics.jsonl")]
    assert max(drawn[2:]) > 4, "groups were replaced after the resume"


def test_the_directory_holds_the_contract(whole_run: Path) -> None:
    assert {path.name for path in whole_run.iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "last", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "train_config.json"),
        *("metrics.jsonl", "completions.jsonl", "eval.json", "eval_items.jsonl"),
    }
    report = json.loads((whole_run / "eval.json").read_text())
    assert report["num_items"] == 16 and report["split"] == "test"
    assert report["base"].keys() == report["adapter"].keys()
    metrics = read_rows(whole_run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 7))
    assert metrics[0].keys() >= {
        *("reward", "correct", "format", "completion_length", "clipped_ratio", "loss", "grad_norm"),
        *("frac_reward_zero_std", "drawn_groups", "dropped_tokens", "learning_rate"),
    }
    record = json.loads((whole_run / "train_config.json").read_text())
    assert {"versions", "device", "git_commit", "base_sha256", "dataset_sha256"} <= record.keys()
    assert record.keys() >= TrainConfig.__dataclass_fields__.keys()


def test_peft_loads_the_directory_and_answers_as_recorded(whole_run: Path) -> None:
    from peft import PeftModel

    from lora_grpo.policy.base import EMBEDDED_FOLDER, Placement, load_base
    from lora_grpo.results.evaluate import EvaluateConfig, evaluate

    model = PeftModel.from_pretrained(
        load_base(EMBEDDED_FOLDER, Placement("cpu", "float32"), False), whole_run
    )
    assert model.peft_config["default"].base_model_name_or_path == "tiny"
    again = evaluate(EvaluateConfig(whole_run))
    recorded = json.loads((whole_run / "eval.json").read_text())
    del recorded["best_step"], recorded["steps"]
    assert again == recorded


def test_the_best_step_is_kept(whole_run: Path) -> None:
    rows = read_rows(whole_run / "validation.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    best = max(rows, key=lambda row: (row["strict_accuracy"], row["format_rate"], row["step"]))
    assert json.loads((whole_run / "eval.json").read_text())["best_step"] == best["step"]
    last = (whole_run / "last/adapter_model.safetensors").read_bytes()
    kept = (whole_run / "adapter_model.safetensors").read_bytes()
    assert (kept == last) == (best["step"] == 6)


def test_resume_refuses_a_changed_world_and_takes_a_moved_one(
    children, tmp_path: Path, capsys
) -> None:
    from lora_grpo.policy.base import EMBEDDED_FOLDER
    from lora_grpo.train.plan import make_plan
    from lora_grpo.train.provenance import read_record

    run, files = tmp_path / "run", tmp_path / "files"
    files.mkdir()
    rows = [{"question": f"q{n}", "answer": str(n), "level": n} for n in range(60)]
    texts = {
        "rows.jsonl": "\n".join(map(json.dumps, rows)),
        "mine.py": "def mine(completions, level, **columns): return [0.0 for _ in level]",
        "prompt.txt": "Put the answer in <answer></answer>.",
    }
    for name, text in texts.items():
        (files / name).write_text(text)
    shutil.copytree(EMBEDDED_FOLDER, files / "base")
    locations = {
        "model": str(files / "base"),
        "dataset": str(files / "rows.jsonl"),
        "system_prompt_file": files / "prompt.txt",
        "reward": (f"{files}/mine.py:mine=0.5",),
    }
    settings = {**SMALL, **locations, "max_steps": 1, "max_completion_length": 8}
    outcome = tmp_path / "outcome"
    finish(children, outcome, **settings, adapters_dir=tmp_path, run_name="run")

    def resumed(**changed) -> dict:
        return read_record(make_plan(TrainConfig(**{**read_run(run), "resume": run, **changed})))

    edits = {
        "mine.py": (texts["mine.py"] + " # edited", "--reward"),
        "prompt.txt": ("Think hard.", "--system-prompt-file"),
        "rows.jsonl": (texts["rows.jsonl"].replace('"level": 7', '"level": 8'), "--dataset"),
    }
    for name, (edited, flag) in edits.items():
        (files / name).write_text(edited)
        with pytest.raises(ValueError, match=f": {flag} .*{name}.* has other contents"):
            resumed()
        (files / name).write_text(texts[name])

    files.rename(tmp_path / "moved")
    moved = {
        name: tuple(v.replace(str(files), f"{tmp_path}/moved") for v in value)
        if isinstance(value, tuple)
        else type(value)(str(value).replace(str(files), f"{tmp_path}/moved"))
        for name, value in locations.items()
    }
    finish(children, outcome, resume=run, max_steps=2, **moved)
    record = json.loads((run / "train_config.json").read_text())
    assert record["model"] == record["base_model"] == f"{tmp_path}/moved/base"
    assert str(files) not in (run / "train_config.json").read_text()
    for path in run.rglob("adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"] == record["model"]
