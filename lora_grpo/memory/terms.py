"""What a run holds in memory, term by term, from the model's shape and the settings alone.

A run is terms that are always there and phases that follow each other; its peak is the first plus
the fullest of the second. Bytes are derived from the arithmetic of each tensor; a `why` that says
`estimate` or `measured` marks the few that cannot be.
"""

from dataclasses import dataclass

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.memory.shape import ModelShape

GIB = 2**30
FLOAT32 = 4
WIDTHS = {"float32": FLOAT32, "bfloat16": 2, "float16": 2}
NF4_BLOCK = 64
OPTIMISER_BYTES = {"8bit": 2, "adafactor": 0, "lion": 4, "sgd": 0}
ADAM_BYTES = 8
CUDA_CONTEXT = GIB // 2
# A process that imported torch, transformers, TRL, PEFT, datasets and bitsandbytes, and has made
# its trainer; then what a tokenizer takes for each of its tokens.
LIBRARIES_ON_CPU = 575_000_000
BYTES_PER_VOCABULARY_ENTRY = 700
DATASET_ON_CPU = 50_000_000


@dataclass(frozen=True)
class Term:
    """One thing that takes memory, and how its bytes come about."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Phase:
    """What is there at one time of a step, beside what is always there."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        """Sum of the phase's own terms."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Prediction:
    """Terms that are always there, and the phases of which one makes the peak."""

    always: tuple[Term, ...]
    phases: tuple[Phase, ...]

    @property
    def fullest(self) -> Phase:
        """The phase that makes the peak."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that the run holds at once."""
        return sum(term.bytes for term in self.always) + self.fullest.bytes


@dataclass(frozen=True)
class Job:
    """A run as far as its memory goes.

    `prompt_length` is the longest prompt in tokens; `total_bytes` is the whole card, of which vLLM
    takes its share; `gives_back` says that freed memory leaves the process (see `allocator`).
    """

    shape: ModelShape
    config: TrainConfig
    backend: str
    rollout: str
    device: str
    dtype: str
    prompt_length: int
    total_bytes: int | None = None
    gives_back: bool = True

    @property
    def width(self) -> int:
        """Bytes of a number in the compute type."""
        return WIDTHS[self.dtype]

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.prompt_length + self.config.max_completion_length

    @property
    def lora_parameters(self) -> int:
        """Parameters of the adapter."""
        return self.shape.lora_parameters(self.config.r, self.config.target_modules)

    @property
    def packs(self) -> bool:
        """The update and sampling compute each prompt once (see `grpo.packed_update`)."""
        return self.backend == "transformers" and self.config.shared_prefix

    @property
    def shares_weights(self) -> bool:
        """Unsloth's trainer and its vLLM read the same weights."""
        return self.rollout == "vllm" and self.backend == "unsloth"


def nf4_bytes(weights: int, double_quant: bool) -> int:
    """Return the bytes of weights in NF4: half a byte each, and a scale for every 64.

    The scale is a float32, or with double quantisation a byte and a float32 for every 256 scales
    (QLoRA, arXiv 2305.14314, section 3).
    """
    scales = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + (scales + -(-scales // 256) * 4 if double_quant else scales * 4)


def weight_terms(job: Job) -> tuple[Term, ...]:
    """Return the base model's terms: linear layers, embeddings, norms."""
    shape, config, width = job.shape, job.config, job.width
    shared = ", shared with vLLM" if job.shares_weights else ""
    size, how = shape.linear_parameters * width, f"x {width} bytes"
    if config.load_in_4bit:
        size = nf4_bytes(shape.linear_parameters, config.bnb_4bit_use_double_quant)
        how = f"at {8 * size / shape.linear_parameters:.2f} bits (NF4)"
    whole, head = shape.embedding_parameters, "tied, so once" if shape.tied else "and lm_head"
    why = f"{whole:,} x {width} bytes, never quantised; {head}{shared}"
    return (
        Term("linear layers", size, f"{shape.linear_parameters:,} weights {how}{shared}"),
        Term("embeddings", whole * width, why),
        Term("norms and biases", shape.small_parameters * width, "never quantised"),
    )


def optimiser_bytes(optim: str) -> int:
    """Return the bytes of state that an optimiser keeps for each trained parameter."""
    return next((size for name, size in OPTIMISER_BYTES.items() if name in optim), ADAM_BYTES)


def adapter_terms(job: Job) -> tuple[Term, ...]:
    """Return the adapter's terms: its float32 weights and the optimiser's state."""
    count, each = job.lora_parameters, optimiser_bytes(job.config.optim)
    return (
        Term("LoRA weights", 4 * count, f"{count:,} x 4 bytes: float32, whatever the base is in"),
        Term("optimiser", each * count, f"{each} bytes per LoRA parameter ({job.config.optim})"),
    )


def process_terms(job: Job) -> tuple[Term, ...]:
    """Return what a process takes before it holds a model."""
    if job.device == "cuda":
        return (Term("CUDA context", CUDA_CONTEXT, "estimate; not yet measured by this project"),)
    tokenizer = job.shape.vocab_size * BYTES_PER_VOCABULARY_ENTRY
    data = 0 if job.config.dataset == "arithmetic" else DATASET_ON_CPU
    why = "measured: about 700 bytes per token, and rows"
    return (
        Term("Python and libraries", LIBRARIES_ON_CPU, "measured: resident after the imports"),
        Term("tokenizer and data", tokenizer + data, why),
    )
