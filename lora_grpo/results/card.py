"""Model cards: README.md of an adapter directory, of a merged folder and of an export.

The text is in `card.md.jinja`; here its values are collected. A card says only what is on record,
leaves out what is not, and names local files by the last part of their path.
"""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.prompt import TEMPLATE_SETTINGS
from lora_grpo.grpo.batch import had_signal
from lora_grpo.machine.files import write_text
from lora_grpo.policy.vllm import RANKS, allowed_rank
from lora_grpo.results.curves import CURVES, write_curves
from lora_grpo.results.metadata import Kind, build_metadata, write_yaml
from lora_grpo.results.records import Records, lora_rank, read_records, short_name
from lora_grpo.results.scoring import find_start, list_models

CARD = "README.md"
SAMPLES_HEADING = "## Sample answers of the adapter"
# Around what a push leaves out by --no-samples; a reader of the card does not see them.
SAMPLE_MARKS = ("<!-- samples -->", "<!-- end of samples -->")
TEMPLATE = Path(__file__).with_name("card.md.jinja")
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin")
SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#])")
HUB_OWNER = "OWNER"  # a push fills in who owns the repository
EMBEDDED_IN_SHELL = (
    "\"$(python -c 'from lora_grpo import EMBEDDED_FOLDER; print(EMBEDDED_FOLDER)')\""
)
# The settings that decided a run.
SHOWN = [
    *("adapter", "sft_steps", "sft_learning_rate"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "load_in_4bit", "dtype"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
    *("max_completion_length", "temperature", "top_p", "dynamic_sampling_rounds", "loss_type"),
    *("importance_sampling_level", "epsilon", "epsilon_high", "beta", "entropy_coef"),
    *("scale_rewards", "multi_objective_aggregation"),
    *("num_iterations", "reward_set", "reward", "reward_weight", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "steps"),
    *("seed", "backend", "rollout", "device", "versions", "base_sha256", "dataset_sha256"),
]


@dataclass(frozen=True)
class CardNote:
    """What the maker of a folder adds to its card; `summary`, `use` and `proof` are Markdown.

    `name` is that of the folder which a merged model is written for.
    """

    title: str
    kind: Kind
    library_name: str
    name: str
    summary: str = ""
    use: str = ""
    proof: str = ""


def write_adapter_card(run_dir: Path) -> None:
    """Write `README.md` and `curves.png` into an adapter directory, from what it holds."""
    name = run_dir.resolve().name
    write_model_card(run_dir, run_dir, CardNote(name, "adapter", "peft", name))


def write_model_card(folder: Path, records: Path, note: CardNote) -> None:
    """Write `README.md` into a folder with weights, and the curves of its run.

    `records` is the folder with the run's records: the adapter directory, or a merged folder.
    """
    from huggingface_hub import ModelCard

    found = read_records(records, folder)
    card_data = build_metadata(found, note.kind, note.library_name, note.title)
    metadata = write_yaml(card_data)
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        metadata=metadata,
        **collect_values(folder, found, note),
    )
    # `str(card)` would write the metadata anew, without the care of `write_yaml`.
    write_text(folder / CARD, f"---\n{metadata}\n---\n{card.text}\n")


def collect_values(folder: Path, records: Records, note: CardNote) -> dict[str, Any]:
    """Return what the template is filled with: what is on record, and functions that make any text
    safe in Markdown."""
    trained, items = records.trained, records.items
    return {
        "note": note,
        "sample_marks": SAMPLE_MARKS,
        "samples_heading": SAMPLES_HEADING,
        "name": note.name,
        "home": "adapters" if note.kind == "adapter" else "merged",
        "hub_place": hub_place(note.name),
        "records": records,
        "base": records.base,
        "trained": trained,
        "found": records.evaluation,
        "stages": [
            (words, records.evaluation[name])
            for name, words in list_models(records.evaluation).items()
        ],
        "started": describe_start(records.evaluation),
        "pairs": [(item["base"]["strict"], item["adapter"]["strict"]) for item in items],
        "had_signal": not records.metrics or any(map(had_signal, records.metrics)),
        "is_lora": note.kind == "adapter" and records.adapter.get("peft_type") == "LORA",
        "has_tokenizer": note.kind != "adapter" or (folder / "tokenizer_config.json").is_file(),
        "template_settings": "".join(
            f", {name}={value}" for name, value in template_settings(folder).items()
        ),
        "length": trained.get("max_completion_length", TrainConfig.max_completion_length),
        "served": serve_command(records, note),
        "settings": list_settings(trained),
        "curves": CURVES if write_curves(records, folder) else None,
        "weights": list_weights(folder),
        **{"code": code, "escape": escape, "fence": fence, "quote": shlex.quote},
        **{"json": write_literal, "percent": percent, "short_name": short_name},
    }


def describe_start(evaluation: dict[str, Any]) -> dict[str, float] | None:
    """Return the paired test of the adapter and what GRPO started from, None for the base."""
    p = evaluation.get(f"mcnemar_p_{find_start(evaluation)}")
    return None if p is None else {"p": p}


def list_settings(trained: dict[str, Any]) -> dict[str, str]:
    """Return the recorded settings that decided the run, as text by their name."""
    hidden = () if trained.get("dynamic_sampling") else ("dynamic_sampling_rounds",)
    hidden += () if trained.get("sft_steps") else ("sft_steps",)
    texts = {name: describe(trained.get(name)) for name in SHOWN if name not in hidden}
    if Path(texts["adapter"]).is_absolute():
        texts["adapter"] = Path(texts["adapter"]).name
    return {name: text for name, text in texts.items() if text}


def describe(value: Any) -> str:
    """Return a setting as text, a reward's file without its folders."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item)
    if isinstance(value, list):
        return ", ".join(Path(str(item)).name for item in value)
    return "" if value is None else str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def write_literal(value: Any, indent: int | None = None) -> str:
    """Return strings, and lists and dictionaries of them, as Python reads them."""
    return json.dumps(value, indent=indent, ensure_ascii=False)


def hub_place(name: str) -> str:
    """Return the id on the Hub that a card names until it is pushed."""
    return f"{HUB_OWNER}/{name}"


def template_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that training gave the folder's chat template, if it knows them."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {name: value for name, value in TEMPLATE_SETTINGS.items() if name in text}


def serve_command(records: Records, note: CardNote) -> str | None:
    """Return vLLM's command for the folder; None where vLLM would refuse the adapter."""
    name, base, adapter = note.name, records.base, records.adapter
    if note.kind == "merged":
        return f"vllm serve {shlex.quote(name)} --served-model-name {shlex.quote(name)}"
    rank = lora_rank(adapter)
    is_plain = adapter.get("peft_type") == "LORA" and not adapter.get("use_dora")
    if note.kind != "adapter" or base is None or not is_plain or rank > RANKS[-1]:
        return None
    model = EMBEDDED_IN_SHELL if base.embedded else shlex.quote(base.name)
    revision = f" --revision {shlex.quote(base.revision)}" if base.revision else ""
    return (
        f"vllm serve {model}{revision} \\\n  --enable-lora "
        f"--max-lora-rank {allowed_rank(rank)} --lora-modules {shlex.quote(f'{name}={name}')}"
    )


def list_weights(folder: Path) -> list[tuple[str, str, str]]:
    """Return name, size and SHA-256 of each weight file."""
    paths = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    return [(path.name, f"{path.stat().st_size:,}", sha256(path)) for path in paths]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def escape(text: str) -> str:
    """Return the text on one line, its Markdown and HTML characters taken literally."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def code(text: str) -> str:
    """Return the text on one line as inline code."""
    text = " ".join(text.split())
    ticks = "`" * (longest_ticks(text) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fence(text: str, language: str = "text") -> str:
    """Return the text as a block of code, fenced by more backticks than it holds in a row."""
    ticks = "`" * max(3, longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"
