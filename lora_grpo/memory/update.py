"""The memory of the packed update: each prompt once a group, attention again in the backward pass,
log-probs in tiles (see `packed_trainer`). Counted at the most that can occur: every group has a
signal, and every completion its full length."""

from lora_grpo.machine.allocator import NARROW
from lora_grpo.memory.terms import Job, Phase, Term

FLOAT32 = 4
ENTROPY_ROWS = 128  # TRL's entropy_from_logits works on this many rows at once
ENTROPY_COPIES = 3
CHUNK_TOKENS, CHUNK_VOCABULARY = 2048, 8192  # TRL's _ChunkedLogProbFunction
CHUNK_COPIES = 6
LOGIT_COPIES_BACKWARD = 3
CUDA_FRAGMENTS, HEAP_FRAGMENTS = 0.05, 1.0
NARROW_BLOCKS = 1.5  # fitted to four runs of the embedded model of 8 steps
# The linear layers of a block's two halves, those that read the same tensor together.
ATTENTION_READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
MLP_READERS = (("gate_proj", "up_proj"), ("down_proj",))


def copies_inputs(job: Job) -> bool:
    """Return whether each adapter has a copy of its input: PEFT casts it to the adapter's float32
    and autocast back, but for 4-bit layers on a GPU."""
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
    middles = width * config.r * len(names)
    if config.lora_dropout:
        mask = 1 if job.device == "cuda" else width
        return middles + sum(layers[name][0] * (width + mask) for name in names)
    if not copies_inputs(job):
        names = [group[0] for group in adapted if group]
    return middles + sum(layers[name][0] for name in names) * width


def norm_saved(job: Job) -> int:
    """Return the bytes per token that a norm of hidden states saves: its input, in float32."""
    return FLOAT32 * (job.shape.hidden_size + 1)


def attention_saved(job: Job, core: int) -> int:
    """Return the bytes per token of a block's first half; `core` is the attention's part."""
    shape = job.shape
    heads = FLOAT32 * (shape.q_dim + shape.kv_dim + shape.heads + shape.kv_heads)
    norms = norm_saved(job) + heads * shape.has_qk_norm
    return norms + core + lora_saved(job, ATTENTION_READERS)


def mlp_saved(job: Job) -> int:
    """Return the bytes per token of a block's second half: gate, activation, up, the adapters'."""
    product = job.width * 3 * job.shape.intermediate_size
    return norm_saved(job) + product + lora_saved(job, MLP_READERS)


def saved_per_token(job: Job) -> int:
    """Return the bytes per token that one block saves for its backward pass.

    Its attention saves queries, repeated keys and values, its output and its mask's row.
    """
    shape, copied = job.shape, job.config.lora_dropout or copies_inputs(job)
    shared = "o_proj" in job.config.target_modules and not copied  # the output is its input
    core = job.width * ((4 - shared) * shape.q_dim + job.sequence_length) + FLOAT32 * shape.heads
    return attention_saved(job, core) + mlp_saved(job)


def gradient_per_token(job: Job) -> int:
    """Return the bytes per token of the gradients that are alive at once inside one block."""
    return job.width * (2 * job.shape.intermediate_size + 2 * job.shape.hidden_size)


def saved_terms(job: Job, tokens: int, each: int, what: str) -> tuple[Term, ...]:
    """Return what a forward pass leaves: `each` bytes per token and block."""
    layers, hidden, width = job.shape.layers, job.shape.hidden_size, job.width
    copies = 0 if width == FLOAT32 else width * job.lora_parameters
    cast = (Term("LoRA in the compute type", copies, "autocast's copy"),) if copies else ()
    why = f"{what} x {layers} blocks x {each:,} bytes saved for the backward pass"
    if job.config.gradient_checkpointing:
        each = hidden * width
        why = f"{what} x {layers} block inputs: all else is recomputed"
    size = tokens * (layers * each + norm_saved(job))
    return (Term("activations", size, why), *cast)


def activation_terms(job: Job) -> tuple[Term, ...]:
    """Return what the forward pass leaves for the backward pass."""
    what = f"{job.config.per_device_train_batch_size} x {job.sequence_length} tokens"
    return saved_terms(job, job.micro_batch_tokens, saved_per_token(job), what)


def dequantised_layer(job: Job) -> tuple[Term, ...]:
    """Return the one 4-bit weight that is whole while its layer works."""
    if not job.config.load_in_4bit:
        return ()
    size = job.shape.largest_linear * job.width
    return (Term("a dequantised layer", size, "the largest linear layer, for its product"),)


def block_terms(job: Job) -> tuple[Term, ...]:
    """Return what the backward pass of one block adds."""
    tokens = job.micro_batch_tokens
    size = tokens * gradient_per_token(job)
    why = "gradients inside one block"
    if job.config.gradient_checkpointing:
        size += tokens * saved_per_token(job)
        why = "one block recomputed, and its gradients"
    return (Term("a block's backward", size, why), *dequantised_layer(job))


def logits_term(job: Job) -> Term:
    """Return the most that the logits of a micro-batch take, whole or in chunks."""
    config, vocabulary = job.config, job.shape.vocab_size
    rows = config.per_device_train_batch_size * config.max_completion_length
    if not job.holds_logits:
        tile = min(rows, CHUNK_TOKENS) * min(vocabulary, CHUNK_VOCABULARY) * FLOAT32
        hidden = rows * job.shape.hidden_size * (FLOAT32 + 2 * job.width)
        why = f"{CHUNK_COPIES} tiles of {min(rows, CHUNK_TOKENS)} x {CHUNK_VOCABULARY}"
        return Term("logits in chunks", CHUNK_COPIES * tile + hidden, why)
    one = rows * vocabulary * FLOAT32
    scaled = one * (config.temperature != 1 and job.device == "cpu")
    forward = 0
    if job.device == "cpu":
        chunk = min(rows, ENTROPY_ROWS) * vocabulary * FLOAT32
        forward = one * (1 + (config.per_device_train_batch_size > 1)) + ENTROPY_COPIES * chunk
    size = max(forward, LOGIT_COPIES_BACKWARD * one) + scaled
    why = f"up to {LOGIT_COPIES_BACKWARD} float32 copies of {rows:,} x {vocabulary:,}"
    return Term("logits", size, why + (", one more for the temperature" if scaled else ""))


def gradient_term(job: Job) -> Term:
    """Return the adapter's gradients: the sum of the micro-batches before."""
    count = job.lora_parameters
    return Term("LoRA gradients", FLOAT32 * count, f"{count:,} x 4 bytes: float32")


def with_fragments(job: Job, phase: Phase, block_bytes: int) -> Phase:
    """Return a phase with what the allocator loses to holes; one block saves `block_bytes`."""
    if job.device == "cuda":
        lost = int(CUDA_FRAGMENTS * phase.bytes)
        why = f"{CUDA_FRAGMENTS:.0%} of the update's tensors: estimate; not yet measured"
    elif job.gives_back:
        return phase
    elif job.shape.hidden_size < NARROW:
        lost = int(NARROW_BLOCKS * block_bytes)
        why = f"measured: holes in the C library's heap, what {NARROW_BLOCKS} blocks save"
    else:
        lost = int(HEAP_FRAGMENTS * phase.bytes)
        why = f"measured: holes in the C library's heap, {HEAP_FRAGMENTS:.0%} (from 0.7 to 1.4)"
    return Phase(phase.name, (*phase.terms, Term("allocator's fragments", lost, why)))


def update_phases(job: Job) -> tuple[Phase, Phase]:
    """Return the two fullest moments of an update: at the loss, and in a block's backward pass."""
    held = (gradient_term(job), *activation_terms(job))
    block = job.micro_batch_tokens * saved_per_token(job)
    return (
        with_fragments(job, Phase("update, at the loss", (*held, logits_term(job))), block),
        with_fragments(job, Phase("update, backward", (*held, *block_terms(job))), block),
    )


NORM_COPIES = 5
TILE_TOKENS, TILE_VOCABULARY = 1024, 4096  # as in `tiled_logprobs`


def prompts_at_once(job: Job) -> int:
    """Return the most different prompts that a micro-batch can hold.

    A step's rows come sorted by prompt, a group behind the other; without its truncated completions
    a group may have a single row.
    """
    config, size, group = (
        job.config,
        job.config.per_device_train_batch_size,
        job.config.num_generations,
    )
    if config.mask_truncated_completions:
        return min(size, config.prompts_per_step)
    starts = range(0, config.completions_per_step, size)
    return max((start + size - 1) // group - start // group + 1 for start in starts)


def completion_tokens(job: Job) -> int:
    """Return the tokens that a completion adds to a packed row: its last one predicts nothing."""
    return job.config.max_completion_length - 1


def packed_tokens(job: Job) -> int:
    """Return the tokens of the largest micro-batch as one packed row."""
    rows = job.config.per_device_train_batch_size
    return prompts_at_once(job) * job.prompt_length + rows * completion_tokens(job)


def is_fused(job: Job) -> bool:
    """Return whether `lora_layers` computes the adapted layers."""
    return job.width == FLOAT32 and not job.config.lora_dropout


def packed_mlp_saved(job: Job) -> int:
    """Return the bytes per token of a block's second half: fused, its product is not kept."""
    config, width = job.config, job.width
    if not (is_fused(job) and "down_proj" in config.target_modules):
        return mlp_saved(job)
    kept = 2 * job.shape.intermediate_size + config.r
    return norm_saved(job) + width * kept + lora_saved(job, MLP_READERS[:1])


def packed_saved_per_token(job: Job) -> int:
    """Return the bytes per token that one block saves; its attention, queries, keys and values."""
    core = job.width * (job.shape.q_dim + 2 * job.shape.kv_dim)
    return attention_saved(job, core) + packed_mlp_saved(job)


def attention_bytes(job: Job) -> int:
    """Return the most that the attention of one group takes when it is computed again.

    In numbers a head: keys and values repeated for each query head, and the outputs; queries,
    output, and prompt's and own keys and values of every completion; and the gradients of those.
    """
    prompt = job.prompt_length
    rows = min(job.config.num_generations, job.config.per_device_train_batch_size)
    own = rows * completion_tokens(job)
    seen = rows * prompt + own
    once = 3 * (prompt + own) + prompt
    return job.width * job.shape.q_dim * (once + 2 * (2 * own + 2 * seen))


def tiles_term(job: Job) -> Term:
    """Return what log-probs hold: tiles, and for each prediction its hidden state and gradient."""
    shape, hidden = job.shape, job.shape.hidden_size
    predictions = job.config.per_device_train_batch_size * job.config.max_completion_length
    rows, columns = min(predictions, TILE_TOKENS), min(shape.vocab_size, TILE_VOCABULARY)
    # Logits and their odds, those of the tile before too; a narrower type's logits come twice.
    each = FLOAT32 * (2 + (shape.vocab_size > columns)) + job.width * (job.width < FLOAT32)
    tiles = rows * (columns * each + 2 * hidden * FLOAT32)
    joined = predictions * hidden * FLOAT32
    size = predictions * hidden * (job.width + FLOAT32) + max(tiles, joined)
    why = f"tiles of {rows:,} x {columns:,}; {predictions:,} hidden states and their gradients"
    return Term("log-probs in tiles", size, why)


def mlp_work(job: Job) -> int:
    """Return the bytes per token that the MLP at work adds: two gradients of its product, fused the
    activation or the product too, or where PEFT casts that product, the float32 copy and itself."""
    inner, hidden, width = job.shape.intermediate_size, job.shape.hidden_size, job.width
    gradients = width * ((2 + is_fused(job)) * inner + hidden)
    casts = (FLOAT32 + width) * inner + 6 * width * hidden
    return max(gradients, casts) if copies_inputs(job) else gradients


def packed_block_term(job: Job) -> Term:
    """Return the most that the backward pass adds: in the last norm, an MLP or a group's attention.

    What a part had saved is gone in the next.
    """
    tokens, hidden, last = packed_tokens(job), job.shape.hidden_size, norm_saved(job)
    mlp = tokens * mlp_work(job)
    attention = attention_bytes(job) + tokens * (2 * job.width * hidden - packed_mlp_saved(job))
    block = max(mlp, attention) - tokens * last
    why = "gradients inside one MLP" if mlp > attention else "a group's attention again"
    if job.config.gradient_checkpointing:
        held_already = norm_saved(job) if job.width == FLOAT32 else 0
        block += tokens * (packed_saved_per_token(job) - held_already)
        why = f"one block recomputed, and {why}"
    norm = tokens * NORM_COPIES * FLOAT32 * hidden
    if norm > block:
        block, why = norm, f"the last norm's: {NORM_COPIES} float32 rows of hidden states"
    return Term("a block's backward", block, why)


def packed_activations(job: Job) -> tuple[Term, ...]:
    """Return what the forward pass leaves for the backward pass."""
    prompts, rows = prompts_at_once(job), job.config.per_device_train_batch_size
    what = (
        f"({prompts} prompts x {job.prompt_length} + {rows} completions x "
        f"{completion_tokens(job)} tokens)"
    )
    return saved_terms(job, packed_tokens(job), packed_saved_per_token(job), what)


def packed_phases(job: Job) -> tuple[Phase, Phase]:
    """Return the two fullest moments of a packed update: at the loss, and in a block's backward."""
    held = (gradient_term(job), *packed_activations(job))
    backward = (packed_block_term(job), *dequantised_layer(job))
    block = packed_tokens(job) * packed_saved_per_token(job)
    return (
        with_fragments(job, Phase("update, at the loss", (*held, tiles_term(job))), block),
        with_fragments(job, Phase("update, backward", (*held, *backward)), block),
    )
