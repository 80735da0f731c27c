"""The memory of the GRPO update: what autograd saves, what one block recomputes, and the logits.

Counted on transformers' decoder blocks with PEFT's LoRA layers and sdpa attention; the tests
compare with what `torch.autograd.graph.saved_tensors_hooks` sees.
"""

from lora_grpo.allocator import NARROW
from lora_grpo.memory import Job, Phase, Term

FLOAT32 = 4
ENTROPY_ROWS = 128  # TRL's entropy_from_logits works on so many rows at once
ENTROPY_COPIES = 3
CHUNK_TOKENS, CHUNK_VOCABULARY = 2048, 8192  # TRL's _ChunkedLogProbFunction
CHUNK_COPIES = 6
LOGIT_COPIES_BACKWARD = 3
CUDA_FRAGMENTS, HEAP_FRAGMENTS = 0.05, 1.0
NARROW_BLOCKS = 2.5  # fitted to four runs of the embedded model of 8 steps


def lora_inputs(job: Job) -> int:
    """Return the bytes a token that the adapters of one block save: their inputs, once each.

    Layers that read the same tensor share it, unless dropout makes a copy and a mask for each; the
    mask is a byte on a GPU and a number on a CPU.
    """
    layers, targets = job.shape.linear_layers, job.config.target_modules
    if job.config.lora_dropout:
        mask = 1 if job.device == "cuda" else job.width
        return sum(layers[name][0] * (job.width + mask) for name in targets)
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
    read = [group[0] for group in groups if set(group) & set(targets)]
    return sum(layers[name][0] for name in read) * job.width


def saved_per_token(job: Job) -> int:
    """Return the bytes a token that one block saves for its backward pass.

    The inputs of both norms in float32; queries, repeated keys and values, the attention's output
    and its mask's row; gate, its activation and up; the adapters' inputs and their r-wide middles.
    """
    shape, config, width = job.shape, job.config, job.width
    norms = FLOAT32 * (2 * shape.hidden_size + 2)
    if shape.has_qk_norm:
        norms += FLOAT32 * (shape.q_dim + shape.kv_dim + shape.heads + shape.kv_heads)
    attention = width * (4 * shape.q_dim + job.sequence_length) + FLOAT32 * shape.heads
    mlp = width * 3 * shape.intermediate_size
    middles = width * config.r * len(config.target_modules)
    return norms + attention + mlp + lora_inputs(job) + middles


def gradient_per_token(job: Job) -> int:
    """Return the bytes a token of the gradients that are alive at once inside one block."""
    return job.width * (2 * job.shape.intermediate_size + 2 * job.shape.hidden_size)


def activation_terms(job: Job) -> tuple[Term, ...]:
    """Return what the forward pass leaves for the backward pass."""
    tokens, layers = job.micro_batch_tokens, job.shape.layers
    sizes = f"{job.config.per_device_train_batch_size} x {job.sequence_length} tokens"
    final = tokens * FLOAT32 * job.shape.hidden_size
    copies = 0 if job.width == FLOAT32 else job.width * job.lora_parameters
    cast = (Term("LoRA in the compute type", copies, "autocast's copy"),) if copies else ()
    if job.config.gradient_checkpointing:
        size = tokens * layers * job.shape.hidden_size * job.width
        why = f"{sizes} x {layers} block inputs: all else is recomputed"
        return (Term("activations", size + final, why), *cast)
    each = saved_per_token(job)
    why = f"{sizes} x {layers} blocks x {each:,} bytes saved for the backward pass"
    return (Term("activations", tokens * layers * each + final, why), *cast)


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
    if config.chunked_logprobs:
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


def with_fragments(job: Job, phase: Phase) -> Phase:
    """Return a phase with what the allocator loses to holes."""
    if job.device == "cuda":
        lost = int(CUDA_FRAGMENTS * phase.bytes)
        why = f"{CUDA_FRAGMENTS:.0%} of the update's tensors: estimate; not yet measured"
    elif job.gives_back:
        return phase
    elif job.shape.hidden_size < NARROW:
        lost = int(NARROW_BLOCKS * job.micro_batch_tokens * saved_per_token(job))
        why = f"measured: holes in the C library's heap, what {NARROW_BLOCKS} blocks save"
    else:
        lost = int(HEAP_FRAGMENTS * phase.bytes)
        why = f"measured: holes in the C library's heap, {HEAP_FRAGMENTS:.0%} (from 0.7 to 1.4)"
    return Phase(phase.name, (*phase.terms, Term("allocator's fragments", lost, why)))


def update_phases(job: Job) -> tuple[Phase, Phase]:
    """Return the two fullest moments of an update: at the loss, and in a block's backward pass."""
    count = job.lora_parameters
    gradients = Term("LoRA gradients", FLOAT32 * count, f"{count:,} x 4 bytes: float32")
    held = (gradients, *activation_terms(job))
    return (
        with_fragments(job, Phase("update, at the loss", (*held, logits_term(job)))),
        with_fragments(job, Phase("update, backward", (*held, *block_terms(job)))),
    )
