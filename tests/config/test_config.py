import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from lora_grpo.config.files import convert
from lora_grpo.config.presets import OTHER_NAMES, PRESETS, choose_preset, parse_train_config
from lora_grpo.config.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]
COUNTS = [
    *("r", "lora_alpha", "max_completion_length", "max_prompt_length", "num_iterations"),
    *("max_steps", "num_eval_items", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("eval_steps", "eval_batch_size", "save_steps", "log_completions_steps", "report_steps"),
    "dynamic_sampling_rounds",
]
KINDS = typing.get_type_hints(TrainConfig)


def parse(*flags: object) -> TrainConfig:
    return parse_train_config([str(flag) for flag in flags])[0]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def save_run(folder: Path, config: TrainConfig, **more: object) -> Path:
    """Write what a run's directory records, as `train_config.json` does it."""
    settings = dataclasses.asdict(config)
    record = {
        **{
            name: str(value) if isinstance(value, Path) else value
            for name, value in settings.items()
        },
        "dataset_sha256": "abc",
        "versions": {"torch": "2"},
        "steps": config.max_steps,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train_config.json", json.dumps(record))
    return folder


def run_script(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/train_lora.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(autouse=True)
def no_gpu(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may depend on the GPU of the machine that it runs on."""
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))


# The settings


def test_the_help_shows_the_docstrings_and_the_chosen_defaults(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--preset", "tiny", "--help")
    assert caught.value.code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "Longest prompt in tokens; longer ones are counted and dropped, never cut." in text
    length = PRESETS["tiny"]["max_completion_length"]
    assert re.search(rf"--max-completion-length INT Longest [^(]* \(default: {length}\)", text)
    source = (ROOT / "lora_grpo/config/train_config.py").read_text()
    for name in FIELDS:
        assert "--" + name.replace("_", "-") in text
        one_line = rf'^    {name}: .*(?:\n(?!    """).*)*\n    """\S.*\."""$'
        assert re.search(one_line, source, re.M), name


def test_no_setting_is_read_nowhere() -> None:
    """Each field is an attribute that some module takes from a configuration."""
    read = set()
    for path in (ROOT / "lora_grpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value
                name = owner.id if isinstance(owner, ast.Name) else owner
                if name == "config" and path.parent.name != "config":
                    read.add(node.attr)
    assert {"loss_settings", "vllm_correction"} <= read
    decide_the_defaults = {"preset", "config"}
    by_property = TrainConfig().loss_settings.keys() | TrainConfig().vllm_correction.keys()
    assert set(FIELDS) - read - by_property - decide_the_defaults == set()


# Every check, by its message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "--num-generations must be at least 2, got 1: a group of one has"),
        (
            {"num_generations": 7},
            "must be a multiple of --num-generations, so that a step holds whole groups: got "
            "8 x 8 with 7",
        ),
        *(({name: 0}, f"--{name.replace('_', '-')} must be at least 1, got 0") for name in COUNTS),
        *(
            ({name: -1}, f"--{name.replace('_', '-')} must be at least 0, got -1")
            for name in ("num_validation_items", "beta", "weight_decay", "epsilon", "epsilon_high")
        ),
        *(
            ({name: bad}, f"--{name.replace('_', '-')} must be greater than 0, got {bad}")
            for name in ("learning_rate", "temperature", "max_grad_norm", "num_train_epochs")
            for bad in (0.0, float("nan"), float("inf"))
        ),
        ({"beta": float("nan")}, "--beta must be at least 0, got nan"),
        ({"epsilon": float("inf")}, "--epsilon must be at least 0, got inf"),
        ({"top_p": 0.0}, "--top-p must be in (0, 1], got 0.0"),
        ({"top_p": 1.1}, "--top-p must be in (0, 1], got 1.1"),
        ({"warmup_ratio": 1.0}, "--warmup-ratio must be in [0, 1), got 1.0"),
        ({"warmup_ratio": -0.1}, "--warmup-ratio must be in [0, 1), got -0.1"),
        ({"lora_dropout": 1.0}, "--lora-dropout must be in [0, 1), got 1.0"),
        ({"lora_dropout": float("nan")}, "--lora-dropout must be in [0, 1), got nan"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "--seed must be from 0 to 4294967295, got 4294967296"),
        *(
            ({"loss_type": loss, **settings}, message)
            for loss, settings, message in [
                ("cispo", {"epsilon_high": 0.28}, "--epsilon-high must be at least 1 with --loss"),
                ("cispo", {"epsilon": 0.2}, "--epsilon 0.2: --loss-type cispo does not read it"),
                ("sapo", {"epsilon_high": 0.3}, "--epsilon-high 0.3: --loss-type sapo does not"),
                ("vespo", {"epsilon": 0.2}, "--epsilon 0.2: --loss-type vespo does not read it"),
                ("dapo", {"epsilon_high": 5.0}, "--epsilon-high must be at most 1 with --loss"),
                ("luspo", {"epsilon": 0.2}, "--epsilon must be at most 0.1 with --loss-type luspo"),
                ("luspo", {"importance_sampling_level": "token"}, "luspo is made for sequence"),
                ("vespo", {"importance_sampling_level": "sequence"}, "vespo is made for token"),
                (
                    "grpo",
                    {"importance_sampling_level": "sequence", "epsilon_high": 0.28},
                    "the ratio of a completion is the mean of its tokens'",
                ),
                (
                    "vespo",
                    {"vllm_importance_sampling_mode": "sequence_mask"},
                    "--vllm-importance-sampling-mode sequence_mask: --loss-type vespo",
                ),
            ]
        ),
        (
            {"vllm_importance_sampling_clip_max": 1.0},
            "--vllm-importance-sampling-clip-max must be greater than 1, got 1",
        ),
        (
            {"init_lora_weights": "orthogonal", "r": 5, "load_in_4bit": False},
            "--init-lora-weights orthogonal with --r 5",
        ),
        (
            {"init_lora_weights": "orthogonal", "load_in_4bit": True},
            "--init-lora-weights orthogonal with --load-in-4bit",
        ),
        ({"loss_type": "bnpo"}, "--loss-type bnpo divides by each micro-batch's tokens"),
        (
            {"dynamic_sampling": True, "scale_rewards": "batch"},
            "--dynamic-sampling with --scale-rewards batch would divide by the spread of",
        ),
        ({"target_modules": ()}, "--target-modules must name linear layers such as q_proj"),
        ({"target_modules": ("q_proj", "lm_head")}, "got q_proj lm_head: tied embeddings cannot"),
        ({"target_modules": ("embed_tokens",)}, "got embed_tokens: tied embeddings cannot"),
        (
            {"num_iterations": 2, "save_steps": 5},
            "--save-steps must be a multiple of --num-iterations, got 5 and 2",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 1.0, "warmup_ratio": 0.0, "epsilon_high": None, "max_steps": None},
        {"seed": 2**32 - 1, "num_validation_items": 0, "num_iterations": 5, "save_steps": 25},
        {"loss_type": "bnpo", "gradient_accumulation_steps": 1},
        {"loss_type": "cispo", "epsilon_high": 1.0},
        {"epsilon": 1.0, "epsilon_high": 1.0},
        {"loss_type": "luspo", "epsilon": 0.1, "importance_sampling_level": "sequence"},
        {"num_generations": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ],
)
def test_the_edge_of_what_is_allowed(settings: dict) -> None:
    config = TrainConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("token", 0.2, 0.28)),
        ({"loss_type": "cispo"}, ("token", None, 5.0)),
        ({"loss_type": "sapo"}, ("token", None, None)),
        ({"loss_type": "luspo"}, ("sequence", 2e-3, 2.5e-3)),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            ("sequence", 3e-4, 4e-4),
        ),
        ({"epsilon_high": 0.3}, ("token", 0.2, 0.3)),
    ],
)
def test_a_loss_brings_its_own_settings(settings: dict, expected: tuple) -> None:
    found = TrainConfig(**settings).loss_settings
    names = ("importance_sampling_level", "epsilon", "epsilon_high")
    assert tuple(found.get(name) for name in names) == expected


def test_a_record_s_resolved_settings_do_not_bind_another_loss(tmp_path: Path) -> None:
    began = parse("--preset", "tiny", "--epsilon", "0.1")
    run = save_run(
        tmp_path, dataclasses.replace(began, **began.loss_settings), eval_batch_size=None
    )
    file = run / "train_config.json"
    assert json.loads(file.read_text())["epsilon_high"] == 0.28
    config = parse("--config", file)
    assert (config.epsilon, config.epsilon_high, config.eval_batch_size) == (0.1, None, 256)
    again = parse("--resume", run, "--epsilon-high", "0.28")
    assert again.loss_settings == began.loss_settings
    with pytest.raises(ValueError, match=r"--epsilon-high was 0\.28, now 0\.3"):
        parse("--resume", run, "--epsilon-high", "0.3")
    other = parse("--config", file, "--loss-type", "cispo", "--epsilon", "None")
    assert other.loss_settings["epsilon_high"] == 5.0


# Presets


def test_every_preset_is_a_choice_and_a_valid_configuration() -> None:
    choices = typing.get_args(typing.get_args(KINDS["preset"])[0])
    assert tuple(PRESETS) == choices
    for name, settings in PRESETS.items():
        config = parse("--preset", name)
        assert {setting: getattr(config, setting) for setting in settings} == settings
        assert config.preset == name
        for setting, value in settings.items():
            assert convert(value, KINDS[setting]) == value, f"{name}: {setting}"


@pytest.mark.parametrize(
    ("script", "preset"),
    [
        (None, "tiny"),
        ("echo 'NVIDIA GeForce RTX 3060, 580.65.06, 8.6, 12288, 11700, [N/A]'", "qwen2.5-0.5b"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "tiny"),
    ],
)
def test_the_hardware_chooses_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, preset: str
) -> None:
    if script is not None:
        write(tmp_path / "nvidia-smi", f"#!/bin/sh\n{script}\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found, reason = choose_preset()
    assert found == preset
    assert ("no NVIDIA GPU" in reason) == (preset == "tiny")
    config, why = parse_train_config([])
    assert config.preset == preset and why == f"preset {preset}: {reason}"
    assert config.model == PRESETS[preset].get("model", TrainConfig.model)


def test_a_driver_that_hangs_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "nvidia-smi", "#!/bin/sh\n/bin/sleep 5\necho GPU 0\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("lora_grpo.machine.hardware.SECONDS", 0.05)
    assert choose_preset()[0] == "tiny"


SMOL = PRESETS["smollm2-135m"]


@pytest.mark.parametrize(
    ("text", "flags", "expected", "why"),
    [
        (None, ["--preset=smollm2-135m"], {"preset": "smollm2-135m"}, "asked for"),
        (None, ["--preset", "smollm2-135m"], {"model": SMOL["model"]}, "asked for"),
        (None, ["--model", "own/model"], {"preset": None, "learning_rate": 2e-5}, "--model was"),
        (None, ["--preset", "None"], {"preset": None, "learning_rate": 2e-5}, "--preset was"),
        (
            "preset: tiny\nmax_steps: 11\neval-steps: 4\nr: 8\n",
            ["--r", "4", "--eval-steps=2"],
            {"r": 4, "eval_steps": 2, "max_steps": 11, "learning_rate": 1e-3, "beta": 0.0},
            "preset tiny: from FILE",
        ),
        (
            "preset: tiny\nsave_steps: 7\n",
            ["--preset", "smollm2-135m"],
            {"preset": "smollm2-135m", "save_steps": 7, "max_completion_length": 256},
            "preset smollm2-135m: asked for",
        ),
        (
            "r: 8\nmodel: own/model",
            [],
            {"preset": None, "r": 8, "model": "own/model", "learning_rate": 2e-5},
            "no preset: --config was given",
        ),
        ("r: 8", [], {"preset": "tiny", "r": 8, "model": "tiny"}, "tiny: this machine has no"),
        ("preset: null", [], {"model": TrainConfig.model}, "--config was given"),
    ],
)
def test_flags_override_the_file_which_overrides_the_preset_which_overrides_defaults(
    tmp_path: Path, text: str | None, flags: list[str], expected: dict, why: str
) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        flags = ["--config", str(write(file, text)), *flags]
    config, said = parse_train_config(flags)
    assert {name: getattr(config, name) for name in expected} == expected
    assert why.replace("FILE", str(file)) in said


def test_only_what_the_flags_leave_is_checked(tmp_path: Path) -> None:
    """A file need not be valid alone: here a flag completes it."""
    file = write(tmp_path / "run.yaml", "model: own/model\nnum_generations: 6\n")
    assert parse("--config", file, "--per-device-train-batch-size=6").prompts_per_step == 8
    with pytest.raises(SystemExit):
        parse("--config", file)


def test_rewards_are_repeatable_and_add_to_the_file_or_change_it_by_name(tmp_path: Path) -> None:
    config = parse("--reward", "a.py:f=0.5", "--reward=b.py:g", "--reward-weight", "format=0")
    assert config.reward == ("a.py:f=0.5", "b.py:g")
    assert config.reward_weight == ("format=0",)
    file = write(
        tmp_path / "run.yaml", "reward: ['a.py:f=0.5', 'a.py:h']\nreward_weight: [format=1]"
    )
    assert parse("--config", file).reward == ("a.py:f=0.5", "a.py:h")
    both = parse("--config", file, "--reward", "c.py:f", "--reward=a.py:f=2")
    assert both.reward == ("a.py:f=2", "a.py:h", "c.py:f")
    both = parse("--config", file, "--reward-weight=format=0.3", "--reward-weight", "correctness=2")
    assert both.reward_weight == ("format=0.3", "correctness=2")


def test_local_paths_become_absolute_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "p.txt", "mine.py", "e.jsonl"):
        write(tmp_path / name, "x")
    for name in ("tiny", "arithmetic", "m"):
        (tmp_path / name).mkdir()
    config = parse(
        *("--model", "m", "--dataset", "d.jsonl", "--system-prompt-file", "p.txt"),
        *("--eval-dataset", "./e.jsonl", "--reward", "mine.py:f=0.5", "--reward", "gone.py:f"),
    )
    assert config.model == str(tmp_path / "m")
    assert config.dataset == str(tmp_path / "d.jsonl")
    assert config.eval_dataset == str(tmp_path / "e.jsonl")
    assert config.system_prompt_file == tmp_path / "p.txt"
    assert config.reward == (f"{tmp_path / 'mine.py'}:f=0.5", "gone.py:f")
    plain = parse("--preset", "tiny")
    assert (plain.model, plain.dataset) == ("tiny", "arithmetic")
    assert parse("--model", "owner/name").dataset == "openai/gsm8k:main"


# Files


def test_a_saved_record_gives_its_settings_again_but_not_its_name(tmp_path: Path) -> None:
    began = parse(
        *("--quiet", "--preset", "tiny", "--seed", "7", "--target-modules", "q_proj", "v_proj"),
        *("--epsilon-high", "None", "--system-prompt-file", "p.txt", "--adapters-dir", tmp_path),
    )
    saved = dataclasses.replace(began, run_name="tiny", dtype="float32", config=Path("old.yaml"))
    file = save_run(tmp_path / "tiny", saved) / "train_config.json"
    config = parse("--config", file)
    expected = dataclasses.replace(saved, run_name=None, config=file, quiet=False)
    assert config == expected
    assert type(config.adapters_dir) is type(tmp_path)


def test_yaml_gives_each_setting_its_type(tmp_path: Path) -> None:
    text = """
        learning_rate: 1e-5     # text to YAML 1.1
        beta: 0                 # a whole number where a fraction is meant
        max_steps: null
        load_in_4bit: no
        init_lora_weights: true
        target_modules: [q_proj, k_proj]
        system_prompt_file: p.txt
        lr_scheduler_type: cosine
        run_name: mine
    """
    config = parse("--config", write(tmp_path / "run.yml", text))
    assert config.learning_rate == 1e-5 and config.beta == 0.0 and type(config.beta) is float
    assert config.max_steps is None and config.load_in_4bit is False
    assert config.init_lora_weights is True
    assert config.target_modules == ("q_proj", "k_proj")
    assert config.system_prompt_file == Path("p.txt") and config.run_name == "mine"
    assert config.lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stepz: 3", "unknown key max_stepz: perhaps you meant max_steps"),
        ("frobnicate: 3", "unknown key frobnicate: see --help"),
        ("resume: adapters/a", "unknown key resume"),
        ("r: 8\nmax_steps: [1", "line 2: broken YAML (expected ',' or ']'"),
        ("a: b: c", "line 1: broken YAML"),
        ("\x00", "broken YAML"),
        ("- r\n- 8", "must hold settings as `name: value`, got list"),
        ("", "got NoneType"),
        ("max_steps: ten", "max_steps must be a whole number or null, got 'ten'"),
        ("max_steps: 3.5", "max_steps must be a whole number or null, got 3.5"),
        ("max_steps: true", "max_steps must be a whole number or null, got True"),
        ("seed: null", "seed must be a whole number, got None"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: true", "learning_rate must be a number, got True"),
        ("load_in_4bit: 1", "load_in_4bit must be true or false, got 1"),
        ("run_name: 2024", "run_name must be text or null, got 2024"),
        ("preset: tyni", "preset must be one of tiny, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b"),
        ("init_lora_weights: 1", "init_lora_weights must be one of True, gaussian, orthogonal"),
        ("reward: mine.py:f", "reward must be a list of text, got 'mine.py:f'"),
        ("target_modules: [1]", "target_modules must be a list of text, got [1]"),
        ("system_prompt_file: 3", "system_prompt_file must be text or null, got 3"),
    ],
)
def test_a_broken_yaml_file_is_told_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse("--config", file)
    assert str(caught.value).startswith(f"--config {file}")
    assert "\n" not in str(caught.value)


def test_a_broken_json_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "run.json", '{"r": 8,\n "seed" 3}')
    with pytest.raises(ValueError, match=f"^--config {file}, line 2: broken JSON"):
        parse("--config", file)
    file.write_bytes(b'{"run_name": "\xe9"}')
    with pytest.raises(ValueError, match=f"^--config {file} is not UTF-8 text"):
        parse("--config", file)


# Going on


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run as it stands after its first step."""
    config = parse(
        *("--preset", "tiny", "--seed", "5", "--reward-weight", "format=0.5", "--r", "8"),
        *("--max-steps", "30", "--learning-rate", "0.001", "--load-in-4bit"),
    )
    return save_run(tmp_path / "adapters" / "tiny", dataclasses.replace(config, run_name="tiny"))


def test_resume_takes_the_saved_settings(run: Path) -> None:
    config, why = parse_train_config(["--resume", str(run)])
    assert (config.seed, config.r, config.reward_weight) == (5, 8, ("format=0.5",))
    assert (config.preset, config.model, config.max_steps) == ("tiny", "tiny", 30)
    assert config.resume == run and why == f"as the run in {run} began"


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--learning-rate", "0.1"], "--learning-rate was 0.001, now 0.1"),
        (["--seed", "6"], "--seed was 5, now 6"),
        (["--preset", "smollm2-135m"], "--preset was tiny, now smollm2-135m"),
        (["--no-load-in-4bit"], "--load-in-4bit was True, now False"),
        (["--run-name", "other"], "--run-name was tiny, now other"),
        (["--dynamic-sampling"], "--dynamic-sampling was False, now True"),
        (["--reward-weight", "format=1"], "was ('format=0.5',), now ('format=1',)"),
        (["--reward", "mine.py:f"], "--reward was (), now ('f',)"),
        (["--seed", "6", "--r", "16"], "--seed was 5, now 6; --r was 8, now 16"),
    ],
)
def test_resume_refuses_a_changed_setting_and_shows_it(
    run: Path, flags: list[str], difference: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(difference)) as caught:
        parse("--resume", run, *flags)
    assert str(caught.value).startswith("--resume continues the same run, but ")


def test_resume_allows_the_same_flags_again_and_what_is_printed(run: Path) -> None:
    again = ("--preset", "tiny", "--seed", "5", "--reward-weight", "format=0.5", "--r", "8")
    config = parse("--resume", run, *again, "--quiet", "--dry-run")
    assert config.reward_weight == ("format=0.5",) and config.quiet and config.dry_run
    save_run(run, config)
    config = parse("--resume", run)
    assert not config.quiet and not config.dry_run


def test_resume_takes_files_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they hold the same is found by their hashes, before anything is loaded."""
    flags = ("--dataset", "d.jsonl", "--reward", "mine.py:f=0.5", "--model", "base")
    flags += ("--system-prompt-file", "p.txt")
    for name in ("old", "new"):
        (tmp_path / name / "base").mkdir(parents=True)
        for file in ("d.jsonl", "mine.py", "p.txt"):
            write(tmp_path / name / file, "x")
    monkeypatch.chdir(tmp_path / "old")
    run = save_run(tmp_path / "run", parse("--preset", "tiny", *flags))
    monkeypatch.chdir(tmp_path / "new")
    assert parse("--resume", run).dataset == f"{tmp_path}/old/d.jsonl"
    moved = parse("--resume", run, *flags)
    assert (moved.model, moved.dataset) == (f"{tmp_path}/new/base", f"{tmp_path}/new/d.jsonl")
    assert moved.reward == (f"{tmp_path}/new/mine.py:f=0.5",)
    assert moved.system_prompt_file == tmp_path / "new/p.txt"
    with pytest.raises(ValueError, match="--reward was"):
        parse("--resume", run, "--reward", "mine.py:f=0.6")


@pytest.mark.parametrize("began", ["30", "None"])
def test_a_run_is_prolonged_and_never_shortened(tmp_path: Path, began: str) -> None:
    """A run over epochs, too, is resumed by the number of its steps."""
    run = save_run(tmp_path, parse("--preset", "tiny", "--max-steps", began), steps=30)
    assert parse("--resume", run).max_steps == 30
    assert parse("--resume", run, "--max-steps", "31").max_steps == 31
    for fewer in ("29", "None"):
        with pytest.raises(ValueError, match=f"--max-steps was 30, now {fewer}: .* prolonged"):
            parse("--resume", run, "--max-steps", fewer)


def test_a_falling_rate_cannot_be_prolonged(tmp_path: Path) -> None:
    flags = ("--preset=tiny", "--max-steps=30", "--lr-scheduler-type=cosine")
    run = save_run(tmp_path, parse(*flags))
    assert parse("--resume", run).max_steps == 30
    with pytest.raises(ValueError, match="now 31: --lr-scheduler-type cosine"):
        parse("--resume", run, "--max-steps", "31")


def test_resume_needs_a_run_and_takes_no_config_file(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^--resume gone holds no train_config\.json"):
        parse("--resume", "gone")
    with pytest.raises(
        ValueError, match=f"^--resume {run} takes the settings of that run: leave out"
    ):
        parse("--resume", run, "--config", write(tmp_path / "run.yaml", "r: 4"))
    write(run / "train_config.json", '{"seed": 1')
    with pytest.raises(ValueError, match=f"^--resume {run}/train_config.json, line 1: broken JSON"):
        parse("--resume", run)


# The script


def test_help_comes_without_torch() -> None:
    done = run_script("--help")
    assert done.returncode == 0 and "--num-generations" in done.stdout
    code = "import sys, lora_grpo.config.presets as p; p.parse_train_config(['--preset', 'tiny'])"
    check = "; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--lr", "1e-4"], "--learning-rate"),
        (["--lora_rank=8"], "--r"),
        (["--vllm-importance-sampling-cap", "2"], "--vllm-importance-sampling-clip-max"),
    ],
)
def test_another_tool_s_name_is_answered_with_the_flag(typed: list[str], meant: str) -> None:
    with pytest.raises(ValueError, match=f"^{typed[0].partition('=')[0]} .* meant {meant}$"):
        parse(*typed)


def test_other_names_lead_to_settings_and_are_none_themselves() -> None:
    assert OTHER_NAMES.keys() <= set(FIELDS)
    assert not {name for names in OTHER_NAMES.values() for name in names} & set(FIELDS)


def test_a_typo_is_answered_with_what_was_meant() -> None:
    done = run_script("--max-stepz", "3")
    assert done.returncode == 2
    assert "Perhaps you meant" in done.stderr and "--max-steps" in done.stderr


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--preset", "tyni"], "invalid choice 'tyni'"),
        (["--preset"], "Missing value for argument '--preset'"),
        (["--num-generations", "1"], "--num-generations must be at least 2, got 1"),
        (["--config", "gone.yaml"], "error: --config gone.yaml does not exist"),
        (["--resume", "gone"], "error: --resume gone holds no train_config.json"),
    ],
)
def test_a_wrong_flag_exits_2_with_a_sentence_and_no_traceback(flags: list, part: str) -> None:
    done = run_script(*flags)
    assert done.returncode == 2 and done.stdout == ""
    assert part in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
