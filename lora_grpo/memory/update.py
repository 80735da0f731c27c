"""The memory of an update: what the forward pass saves, the log-probs, one block's backward pass.

Counted for the packed update (`grpo.packed_update`): each prompt once per group, attention again in
the backward pass, log-probs in tiles; and at the most that can occur: every group has a signal, and
every completion its full length. Any other update is counted as the same with a prompt for each
completion and logits of its own.
"""

from lora_grpo.machine.allocator import NARROW
from lora_grpo.memory.terms import FLOAT32, Job, Phase, Term

NORM_COPIES = 5
TILE_TOKENS, TILE_VOCABULARY = 1024, 4096  # as in `tiled_logprobs`
LOGIT_COPIES = 3
ENTROPY_COPIES = 3  # an estimate: what an entropy with a gradient saves
# Unsloth's log-probs: an estimate of 6 tiles of this many tokens and vocabulary entries.
UNSLOTH_TILES, UNSLOTH_TOKENS, UNSLOTH_VOCABULARY = 6, 2048, 8192
# What an allocator loses to holes, as a share of the update's tensors.
CUDA_HOLES, HEAP_HOLES, NARROW_HOLES = 0.05, 1.0, 0.32
# The linear layers of a block's two halves, those that read the same tensor together.
ATTENTION_READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
MLP_READERS = (("gate_proj", "up_proj"), ("down_proj",))


def prompts_at_once(job: Job) -> int:
    """Return the most prompts that a micro-batch computes."""
    return job.config.prompts_at_once(job.packs)


def completion_tokens(job: Job) -> int:
    """Return the tokens that a completion adds to a packed row: its last one predicts nothing."""
    return job.config.max_completion_length - 1


def update_tokens(job: Job) -> int:
    """Return the tokens of the largest micro-batch."""
    rows = job.config.per_device_train_batch_size
    return prompts_at_once(job) * job.prompt_length + rows * completion_tokens(job)


def is_fused(job: Job) -> bool:
    """Return whether `policy.layers` computes the adapted layers."""
    return job.packs and job.width == FLOAT32 and not job.config.lora_dropout


def copies_inputs(job: Job) -> bool:
    """Return whether each adapter has a copy of its input: PEFT casts it to the adapter's float32
    and autocast back, except for 4-bit layers on a GPU."""
    quantised = job.config.load_in_4bit and job.device == "cuda"
    return job.width < FLOAT32 and job.backend == "transformers" and not quantised


def lora_saved(job: Job, readers: tuple[tuple[str, ...], ...]) -> int:
    """Return the bytes per token that the adapters of these layers save: inputs and r-wide middles.

    Layers that read the same tensor share it, unless each has a copy; dropout makes a copy and a
    mask for each, a byte on a GPU and a number on a CPU.
    """
    layers, config, width = job.shape.linear_layers, job.config, job.width
    adapted = [[name for name in group if name in config.target_modules] for group in readers]
    names = [name for group in adapted for name in group]
    middles, each = width * config.r * len(names), width
    if config.lora_dropout:
        each += 1 if job.device == "cuda" else width
    elif not copies_inputs(job):
        names = [group[0] for group in adapted if group]
    return middles + each * sum(layers[name][0] for name in names)


def norm_saved(job: Job) -> int:
    """Return the bytes per token that a norm of hidden states saves: its input, in float32."""
    return FLOAT32 * (job.shape.hidden_size + 1)


def mlp_saved(job: Job) -> int:
    """Return the bytes per token that a block's second half saves: gate and up, and, where it is
    not fused, activation and product."""
    inner, config = job.width * job.shape.intermediate_size, job.config
    if is_fused(job) and "down_proj" in config.target_modules:
        kept = 2 * inner + job.width * config.r
        return norm_saved(job) + kept + lora_saved(job, MLP_READERS[:1])
    return norm_saved(job) + 3 * inner + lora_saved(job, MLP_READERS)


def attention_saved(job: Job) -> int:
    """Return the bytes per token that attention saves: queries, keys and values; TRL's own repeats
    keys and values for each head, and keeps its output and its mask's row."""
    shape = job.shape
    if job.packs or job.backend == "unsloth":
        return job.width * (shape.q_dim + 2 * shape.kv_dim)
    copied = job.config.lora_dropout or copies_inputs(job)
    read_too = "o_proj" in job.config.target_modules and not copied  # counted as its input
    repeated = (4 - read_too) * shape.q_dim
    return job.width * (repeated + job.sequence_length) + FLOAT32 * shape.heads


def saved_per_token(job: Job) -> int:
    """Return the bytes per token that one block saves for its backward pass."""
    shape = job.shape
    heads = FLOAT32 * (shape.q_dim + shape.kv_dim + shape.heads + shape.kv_heads)
    attention = attention_saved(job) + lora_saved(job, ATTENTION_READERS)
    return norm_saved(job) + heads * shape.has_qk_norm + attention + mlp_saved(job)


def activation_terms(job: Job) -> tuple[Term, ...]:
    """Return what the forward pass leaves for the backward pass."""
    layers, width, each = job.shape.layers, job.width, saved_per_token(job)
    tokens, rows = update_tokens(job), job.config.per_device_train_batch_size
    what = (
        f"({prompts_at_once(job)} prompts x {job.prompt_length} + {rows} completions x "
        f"{completion_tokens(job)} tokens) x {layers}"
    )
    why = f"{what} blocks x {each:,} bytes saved for the backward pass"
    if job.config.gradient_checkpointing:
        each, why = job.shape.hidden_size * width, f"{what} block inputs: the rest is recomputed"
    cast = job.lora_parameters * width * (width < FLOAT32)
    return (
        Term("activations", tokens * (layers * each + norm_saved(job)), why),
        Term("LoRA in the compute type", cast, "autocast's copy"),
    )


def logits_term(job: Job) -> Term:
    """Return what log-probs hold."""
    config, vocabulary = job.config, job.shape.vocab_size
    rows = config.per_device_train_batch_size * config.max_completion_length
    if job.packs:
        return tiles_term(job, rows)
    if job.backend == "unsloth":
        tokens = min(rows, UNSLOTH_TOKENS)
        tile = tokens * min(vocabulary, UNSLOTH_VOCABULARY) * FLOAT32
        hidden = rows * job.shape.hidden_size * (FLOAT32 + 2 * job.width)
        why = f"estimate: {UNSLOTH_TILES} tiles of {tokens} x {UNSLOTH_VOCABULARY}"
        return Term("logits in chunks", UNSLOTH_TILES * tile + hidden, why)
    copies = LOGIT_COPIES + (config.temperature != 1) + ENTROPY_COPIES * (config.entropy_coef > 0)
    why = f"{copies} float32 copies of {rows:,} x {vocabulary:,}"
    return Term("logits", copies * rows * vocabulary * FLOAT32, why)


def tiles_term(job: Job, predictions: int) -> Term:
    """Return what the packed update's log-probs hold: tiles, and for each prediction its hidden
    state and gradient."""
    vocabulary, hidden = job.shape.vocab_size, job.shape.hidden_size
    rows, columns = min(predictions, TILE_TOKENS), min(vocabulary, TILE_VOCABULARY)
    # Logits and their odds, those of the tile before too; a narrower type's logits come twice.
    each = FLOAT32 * (2 + (vocabulary > columns)) + job.width * (job.width < FLOAT32)
    gradients = 1 + (job.config.entropy_coef > 0)
    tiles = rows * (columns * each + (1 + gradients) * hidden * FLOAT32)
    joined = gradients * predictions * hidden * FLOAT32
    size = predictions * hidden * (job.width + gradients * FLOAT32) + max(tiles, joined)
    why = f"tiles of {rows:,} x {columns:,}; {predictions:,} hidden states and their gradients"
    return Term("log-probs in tiles", size, why)


def attention_work(job: Job) -> int:
    """Return the most bytes that the attention of one group takes when it is computed again.

    With C completions of S tokens after a prompt of P, in rows of q_dim numbers:

    =====================================================  ==============
    queries, keys and values of prompt and completions     3 (P + C S)
    the prompt's output                                    P
    each completion's queries and output                   2 C S
    keys and values that it reads, repeated for each head  2 C (P + S)
    the gradients of the last two                          the same again
    =====================================================  ==============
    """
    prompt = job.prompt_length
    rows = min(job.config.num_generations, job.config.per_device_train_batch_size)
    own = rows * completion_tokens(job)
    seen = rows * prompt + own
    return job.width * job.shape.q_dim * (3 * (prompt + own) + prompt + 2 * (2 * own + 2 * seen))


def mlp_work(job: Job) -> int:
    """Return the bytes per token that the MLP at work adds: two gradients of its product, fused the
    activation or the product too, or where PEFT casts that product, the float32 copy and itself."""
    inner, hidden, width = job.shape.intermediate_size, job.shape.hidden_size, job.width
    gradients = width * ((2 + is_fused(job)) * inner + hidden)
    casts = (FLOAT32 + width) * inner + 6 * width * hidden
    return max(gradients, casts) if copies_inputs(job) else gradients


def block_term(job: Job) -> Term:
    """Return the most that the backward pass adds: in the last norm, an MLP or a group's attention.

    What a part had saved is gone in the next.
    """
    tokens, hidden = update_tokens(job), job.shape.hidden_size
    mlp = tokens * mlp_work(job)
    attention = attention_work(job) + tokens * (2 * job.width * hidden - mlp_saved(job))
    block = max(mlp, attention) - tokens * norm_saved(job)
    why = "gradients inside one MLP" if mlp > attention else "a group's attention again"
    if job.config.gradient_checkpointing:
        held_already = norm_saved(job) if job.width == FLOAT32 else 0
        block += tokens * (saved_per_token(job) - held_already)
        why = f"one block recomputed, and {why}"
    norm = tokens * NORM_COPIES * FLOAT32 * hidden
    if norm > block:
        block, why = norm, f"the last norm's: {NORM_COPIES} float32 rows of hidden states"
    return Term("a block's backward", block, why)


def with_holes(job: Job, phase: Phase) -> Phase:
    """Return a phase with what the allocator loses to holes between its tensors."""
    share, why = HEAP_HOLES, "measured: from 0.7 to 1.4 of the update's tensors"
    if job.device == "cuda":
        share, why = CUDA_HOLES, "estimate; not yet measured"
    elif job.gives_back:
        share, why = 0, "freed memory leaves the process"
    elif job.shape.hidden_size < NARROW:
        share, why = NARROW_HOLES, "measured in a narrow model"
    lost = Term("allocator's fragments", int(share * phase.bytes), f"{share:.0%}, {why}")
    return Phase(phase.name, (*phase.terms, lost))


def update_phases(job: Job) -> tuple[Phase, Phase]:
    """Return the two fullest moments of an update: at the loss, and in a block's backward pass."""
    count = job.lora_parameters
    held = (
        Term("LoRA gradients", FLOAT32 * count, f"{count:,} x 4 bytes: float32"),
        *activation_terms(job),
    )
    return (
        with_holes(job, Phase("update, at the loss", (*held, logits_term(job)))),
        with_holes(job, Phase("update, backward", (*held, block_term(job)))),
    )
