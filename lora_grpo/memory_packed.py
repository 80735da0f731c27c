"""The memory of the packed update: each prompt once a group, attention again in the backward pass,
log-probs in tiles (see `packed_trainer`). Counted at the most that can occur: every group has a
signal, and every completion its full length."""

from lora_grpo.memory import Job, Phase, Term
from lora_grpo.memory_update import (
    FLOAT32,
    MLP_READERS,
    attention_saved,
    copies_inputs,
    dequantised_layer,
    gradient_term,
    lora_saved,
    mlp_saved,
    norm_saved,
    saved_terms,
    with_fragments,
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
    """Tell whether `lora_layers` computes the adapted layers."""
    return job.width == FLOAT32 and not job.config.lora_dropout


def packed_mlp_saved(job: Job) -> int:
    """Return the bytes a token of a block's second half: fused, its product is not kept."""
    config, width = job.config, job.width
    if not (is_fused(job) and "down_proj" in config.target_modules):
        return mlp_saved(job)
    kept = 2 * job.shape.intermediate_size + config.r
    return norm_saved(job) + width * kept + lora_saved(job, MLP_READERS[:1])


def packed_saved_per_token(job: Job) -> int:
    """Return the bytes a token that one block saves; its attention, queries, keys and values."""
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
    """Return the bytes a token that the MLP at work adds: two gradients of its product, fused the
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
