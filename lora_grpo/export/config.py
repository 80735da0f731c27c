"""What to export and where: the settings of `export_model.py`, checked before weights load."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from lora_grpo.export.gguf.quants import QUANTS

FORMATS = ("safetensors", "gguf", "gguf-adapter", "ollama", "fp8", "int8", "w4a16", "bnb-4bit")
DEFAULT_QUANT = "q8_0"


@dataclass(frozen=True)
class ExportConfig:
    """Export an adapter, or a merged folder, to formats that vLLM, llama.cpp and Ollama run.

    Every format is read back and compared with the merged model; export_report.json says how.
    """

    source: Positional[Annotated[Path, arg(metavar="ADAPTER_DIR")]]
    """An adapter directory, such as adapters/<run>, or a folder that merge_adapter.py wrote."""
    format: tuple[str, ...]
    """One or more of safetensors, gguf, gguf-adapter (the LoRA alone), ollama, fp8, int8, w4a16
    (for vLLM, by llm-compressor) and bnb-4bit; they share one merge."""
    quant: tuple[str, ...] = ()
    """Types of GGUF files: f16, bf16, q8_0, q5_0, q4_0, and by llama.cpp q6_k, q5_k_m, q4_k_m; by
    default q8_0. Ollama takes the first."""
    output_dir: Path | None = None
    """Folder to write, which must not exist; by default exports/<run>-<format>[-<quant>]. With
    several formats each gets a folder in it."""
    model: str | None = None
    """Base to merge into, a Hub id or a folder; by default the one that the adapter remembers."""
    base: Literal["original", "dequantized"] = "original"
    """Weights to merge into: the original ones, or those that the policy saw in 4-bit training."""
    num_prompts: int = 8
    """Prompts to compare each export and the merged model on."""
    num_items: int | None = None
    """Number of held-out problems to answer also with the merged model and with each export;
    by default none."""
    batch_size: int = 32
    """Problems answered at once, where what answers can."""

    def __post_init__(self) -> None:
        check_names("--format", self.formats, FORMATS)
        check_names("--quant", self.quants, QUANTS)
        if self.quant and not {"gguf", "ollama"} & set(self.formats):
            raise ValueError("--quant is for --format gguf and ollama, neither is asked for")
        for name in ("num_prompts", "num_items", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.source.is_dir():
            raise ValueError(
                f"ADAPTER_DIR {self.source} is no directory: give one that train_lora.py or "
                "merge_adapter.py wrote, such as adapters/<run>"
            )
        if self.target.exists():
            raise ValueError(
                f"--output-dir {self.target} exists already and is never overwritten: choose "
                "another or move it away"
            )

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats asked for, each once; they may be given with commas between them."""
        return split(self.format)

    @property
    def quants(self) -> tuple[str, ...]:
        """The types of GGUF files asked for, or the default."""
        return split(self.quant) or (DEFAULT_QUANT,)

    @property
    def name(self) -> str:
        """What the model is called: the run's name."""
        return self.source.resolve().name

    @property
    def target(self) -> Path:
        """The folder to write."""
        files = self.quants if {"gguf", "ollama"} & set(self.formats) else ()
        return self.output_dir or Path("exports") / "-".join((self.name, *self.formats, *files))

    def folder(self, root: Path, name: str) -> Path:
        """Return the folder of a format inside the whole export's."""
        return root if len(self.formats) == 1 else root / name


def split(given: tuple[str, ...]) -> tuple[str, ...]:
    names = (name.strip().lower() for text in given for name in text.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def check_names(flag: str, names: tuple[str, ...], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{flag} {' '.join(unknown)}: allowed are {', '.join(known)}, one or more of them"
        )


def plain_name(name: str) -> str:
    """Return a run's name as file systems, llama.cpp, Ollama and the Hub all take it: up to 80
    letters, digits, `.`, `_` and `-`, the first a letter or a digit."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return re.sub(r"([-.])\1+", r"\1", kept).strip("-._")[:80].strip("-._") or "model"
