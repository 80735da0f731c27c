"""`--adapter`: GRPO goes on with an adapter's weights, in its shape, with it as the reference."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from killed_runs import SMALL, finish, kill_at, lines_of, start
from run_directory import contents, read_rows
from safetensors.torch import load_file, save_file

from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.train.plan import Plan, make_plan

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NEXT = {**SMALL, "max_steps": 4, "beta": 0.1}


@pytest.fixture(scope="module")
def first(children, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier run, of another rank than the default."""
    home = tmp_path_factory.mktemp("first")
    finish(children, home / "outcome", **SMALL, r=8, adapters_dir=home, run_name="first")
    return home / "first"


@pytest.fixture(scope="module")
def second(children, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that continues it."""
    home = tmp_path_factory.mktemp("second")
    settings = {**NEXT, "adapter": str(first), "adapters_dir": home, "run_name": "second"}
    finish(children, home / "outcome", **settings)
    return home / "second"


def test_the_weights_the_reference_and_the_first_figures_are_the_given_adapter_s(
    first: Path, second: Path
) -> None:
    given, begun = (load_file(folder / WEIGHTS) for folder in (first, second / "start"))
    assert given.keys() == begun.keys() and all(given[key].equal(begun[key]) for key in given)
    trained = load_file(second / "last" / WEIGHTS)
    assert trained.keys() == given.keys() and not all(given[k].equal(trained[k]) for k in given)
    metrics = read_rows(second / "metrics.jsonl")
    assert abs(metrics[0]["kl"]) < 1e-6 < metrics[3]["kl"]
    before, after = (read_rows(run / "eval_items.jsonl") for run in (first, second))
    assert [row["adapter"] for row in before] == [row["start"] for row in after]
    assert "mcnemar_p_start" in json.loads((second / "eval.json").read_text())
    assert "given adapter" in (second / "README.md").read_text()
    assert json.loads((second / "train_config.json").read_text())["r"] == 8


def test_a_kill_changes_nothing_and_the_given_adapter_may_go(
    children, first: Path, second: Path, tmp_path: Path
) -> None:
    copy, run, outcome = tmp_path / "copies/first", tmp_path / "second", tmp_path / "outcome"
    shutil.copytree(first, copy)
    settings = {**NEXT, "adapter": str(copy), "adapters_dir": tmp_path, "run_name": "second"}
    process = start(children, outcome, **settings)
    kill_at(process, lambda: lines_of("metrics.jsonl", 1)(run), 0.0)
    shutil.rmtree(copy)
    finish(children, outcome, resume=run)
    assert contents(run) == contents(second)


def test_its_base_is_the_default_model(first: Path) -> None:
    config, why = parse_train_config(["--adapter", str(first)])
    assert config.model == "tiny" and config.adapter == str(first) and "tiny" in why
    other, _ = parse_train_config(["--adapter", str(first), "--model", "somebody/else"])
    assert other.model == "somebody/else"


def plan(adapter: Path, **settings) -> Plan:
    known = {**SMALL, "adapter": str(adapter), "adapters_dir": adapter.parent / "out"}
    return make_plan(dataclasses.replace(TrainConfig(**known), **settings))


def changed(first: Path, home: Path, **entries) -> Path:
    folder = shutil.copytree(first, home / "changed")
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | entries))
    return folder


def test_what_it_decides_may_be_given_if_it_is_the_same(first: Path) -> None:
    assert plan(first, r=8).config.r == plan(first).config.r == 8
    with pytest.raises(ValueError, match=r"--r 4 with --adapter .*which has 8"):
        plan(first, r=4)
    with pytest.raises(ValueError, match=r"--target-modules q_proj with --adapter"):
        plan(first, target_modules=("q_proj",))
    with pytest.raises(ValueError, match=r"--init-lora-weights gaussian with --adapter"):
        plan(first, init_lora_weights="gaussian")


@pytest.mark.parametrize(
    "entries",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"target_modules": ".*q_proj"},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_what_is_not_plain_lora_is_refused(first: Path, tmp_path: Path, entries) -> None:
    with pytest.raises(ValueError, match=rf"--adapter .* sets {next(iter(entries))}"):
        plan(changed(first, tmp_path, **entries))


def test_an_adapter_of_another_base_is_refused(first: Path, tmp_path: Path) -> None:
    record = json.loads((first / "train_config.json").read_text())
    other = shutil.copytree(first, tmp_path / "other")
    (other / "train_config.json").write_text(json.dumps(record | {"base_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"--adapter .* was trained on tiny.*--model tiny"):
        plan(other)
    (other / "train_config.json").unlink()
    state = load_file(other / WEIGHTS)
    key = next(iter(state))
    save_file(state | {key: state[key][:, :-1].contiguous()}, other / WEIGHTS)
    with pytest.raises(ValueError, match=r"--adapter .* does not fit --model tiny: 1 tensors"):
        plan(other)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--adapter .*nowhere is neither a local folder"):
        plan(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=CONFIG):
        plan(tmp_path)
