"""The shape of a model from its config.json alone: every linear layer, and what each part counts.

No weights and no torch: a folder, a Hub id or a published table goes in, parameter counts come out,
exact for the Llama, Qwen2 and Qwen3 families (a Llama's optional biases are left out).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.machine.files import read_json
from lora_grpo.policy.base import resolve_model

REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
FAMILIES = ("llama", "qwen2", "qwen3")
QWEN_KV_HEADS = 32  # what transformers takes where a Qwen config.json is silent
QWEN3_HEAD_DIM = 128

# What the presets' own config.json files say, for a machine that cannot ask the Hub.
PUBLISHED: dict[str, dict[str, Any]] = {
    name: dict(zip(("model_type", *REQUIRED, "num_key_value_heads"), values, strict=True))
    | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    for name, values in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 49152, 3),
        "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 151936, 2),
        "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 151936, 2),
        "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11008, 36, 16, 151936, 2),
        "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 151936, 8),
    }.items()
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder's dimensions; H = hidden_size, V = vocab_size."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    has_qk_norm: bool
    has_qkv_bias: bool
    stored_bytes: int

    @property
    def q_dim(self) -> int:
        """Width of the queries, of the attention's output, and of keys repeated for each head."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the keys and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, as inputs and outputs."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.q_dim),
            "k_proj": (hidden, self.kv_dim),
            "v_proj": (hidden, self.kv_dim),
            "o_proj": (self.q_dim, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of every block's linear layers: what 4-bit loading quantises."""
        sizes = self.linear_layers.values()
        return self.layers * sum(inputs * outputs for inputs, outputs in sizes)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embeddings, V x H, and of the output layer where it is not the same."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def small_parameters(self) -> int:
        """Norms, Qwen3's also of queries and keys; Qwen2's biases of queries, keys and values."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.has_qk_norm
        biases = self.has_qkv_bias * (self.q_dim + 2 * self.kv_dim)
        return self.layers * (norms + biases) + self.hidden_size

    @property
    def parameters(self) -> int:
        """Every parameter of the model."""
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    def lora_parameters(self, r: int, target_modules: tuple[str, ...]) -> int:
        """Return the parameters of a LoRA adapter: r x (inputs + outputs) a layer.

        Raises:
            ValueError: a target module that the model does not have.
        """
        missing = sorted(set(target_modules) - self.linear_layers.keys())
        if missing:
            raise ValueError(
                f"--target-modules {' '.join(missing)}: the model has no such linear layer, it has "
                f"{' '.join(self.linear_layers)}"
            )
        return r * self.layers * sum(sum(self.linear_layers[name]) for name in target_modules)

    def cache_per_token(self, width: int) -> int:
        """Return the bytes of one token's keys and values, at `width` bytes per number."""
        return 2 * self.layers * self.kv_dim * width


def build_shape(values: dict[str, Any], source: str) -> ModelShape:
    """Return the shape that a config.json's values describe.

    Raises:
        ValueError: a family that is not known here, or a size that is missing.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"--model {source} is of the family {family}: memory can be predicted for "
            f"{', '.join(FAMILIES)}"
        )
    missing = [name for name in REQUIRED if not isinstance(values.get(name), int)]
    if missing:
        raise ValueError(f"--model {source}: config.json gives no {', '.join(missing)}")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads", heads if family == "llama" else QWEN_KV_HEADS)
    head_dim = values.get("head_dim", QWEN3_HEAD_DIM if family == "qwen3" else None)
    stored = values.get("dtype") or values.get("torch_dtype") or "float32"
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        vocab_size=values["vocab_size"],
        tied=bool(values.get("tie_word_embeddings", False)),
        has_qk_norm=family == "qwen3",
        has_qkv_bias=family == "qwen2",
        stored_bytes=4 if stored == "float32" else 2,
    )


def read_shape(folder: Path) -> ModelShape:
    """Return the shape of the model in a folder."""
    return build_shape(read_json(folder / "config.json"), str(folder))


def find_shape(config: TrainConfig) -> tuple[ModelShape, str]:
    """Return the shape of the model that a run would load, and where it was read.

    Raises:
        FileNotFoundError: neither a folder, nor the Hub, nor the published table knows the model.
        ValueError: see `build_shape`.
    """
    try:
        folder = resolve_model(config.model, config.revision, weights=False)
    except FileNotFoundError:
        if config.model not in PUBLISHED:
            raise
        shape = build_shape(PUBLISHED[config.model], config.model)
        return shape, f"shape of {config.model} as published: the Hub did not answer"
    return read_shape(folder), f"{folder / 'config.json'}"
