"""The memory of loading and of sampling, by vLLM or `generate`, and a whole run's prediction."""

import math
from dataclasses import replace

from lora_grpo.memory.terms import GIB, Job, Phase, Prediction, Term, always_terms, weight_terms
from lora_grpo.memory.update import FLOAT32, packed_phases, update_phases
from lora_grpo.policy.vllm import VLLM_BATCH_TOKENS

SAMPLING_COPIES = 4  # logits, processed scores, probabilities, and the draw
SCORE_COPIES = 4  # of the prompt, joined with the completion's own, scaled, and their softmax
SORTING_COPIES = 4  # top_p also sorts: values, 8-byte positions, their sum
VLLM_GRAPHS = 2 * GIB // 5
VLLM_ON_CPU = GIB // 2
BLOCK = 16  # tokens of a KV cache page


def sampling_copies(job: Job) -> int:
    """Return the float32 rows of the vocabulary that drawing one token needs."""
    return SAMPLING_COPIES + SORTING_COPIES * (job.config.top_p < 1)


def sequences_in_flight(job: Job) -> int:
    """Return the completions that vLLM writes at once."""
    return job.config.vllm_max_num_seqs or job.config.completions_per_step


def vllm_width(job: Job) -> int:
    """Return the bytes of a number in vLLM; its CPU build computes in float32."""
    return job.width if job.device == "cuda" else FLOAT32


def vllm_cache_term(job: Job, sequences: int) -> Term:
    """Return the KV cache that vLLM needs for that many sequences at full length."""
    limit = job.config.max_prompt_length + job.config.max_completion_length
    tokens = sequences * -(-limit // BLOCK) * BLOCK
    each = job.shape.cache_per_token(vllm_width(job))
    why = f"{sequences} sequences x {limit} tokens x {each:,} bytes"
    return Term("vLLM's KV cache", tokens * each, why)


def vllm_own_terms(job: Job) -> tuple[Term, ...]:
    """Return what vLLM holds beside its cache: weights of its own, its adapter, activations."""
    shape, width = job.shape, vllm_width(job)
    profiled = VLLM_BATCH_TOKENS * (3 * shape.intermediate_size + 4 * shape.hidden_size) * width
    sampled = sequences_in_flight(job) * shape.vocab_size * FLOAT32 * SAMPLING_COPIES
    own = Term("vLLM's adapter", job.lora_parameters * width, "one LoRA slot in the compute type")
    working = Term("vLLM's activations", profiled + sampled, "estimate: 8192 tokens, and sampling")
    if job.shares_weights:
        return own, working
    in_4bit = job.config.load_in_4bit and job.device == "cuda"
    config = replace(job.config, load_in_4bit=in_4bit)
    kept = replace(job, config=config, dtype=job.dtype if job.device == "cuda" else "float32")
    size = sum(term.bytes for term in weight_terms(kept))
    weights = Term("vLLM's weights", size, "its own: this backend does not share them")
    return weights, own, working


def vllm_share(job: Job, sequences: int, total_bytes: int) -> float:
    """Return the `gpu_memory_utilization` that holds vLLM's weights, cache and activations."""
    needs = sum(term.bytes for term in (*vllm_own_terms(job), vllm_cache_term(job, sequences)))
    if job.shares_weights:
        needs += sum(term.bytes for term in weight_terms(job))
    return needs / total_bytes


def given_cache(job: Job, share: float, total_bytes: int) -> Term:
    """Return the KV cache that a share of the card leaves vLLM, at least one sequence's."""
    other = vllm_share(job, 0, total_bytes) * total_bytes
    least = vllm_cache_term(job, 1)
    size = max(int(share * total_bytes - other), least.bytes)
    return Term("vLLM's KV cache", size, f"what a share of {share:.2f} of the card leaves for it")


def vllm_terms(job: Job) -> tuple[Term, ...]:
    """Return what vLLM holds while it samples."""
    share = job.config.vllm_gpu_memory_utilization
    if share is not None and job.total_bytes is not None:
        cache = given_cache(job, share, job.total_bytes)
    else:
        cache = vllm_cache_term(job, sequences_in_flight(job))
    return (*vllm_own_terms(job), cache)


def sampling_terms(job: Job, prompts: int, sequences: int, decoding: int) -> tuple[Term, ...]:
    """Return what sampling by the model itself holds at the end of its longest completion.

    So many different prompts are held once each; a layer needs `decoding` bytes for one token more.
    """
    shape, width = job.shape, job.width
    tokens = prompts * job.prompt_length + sequences * job.config.max_completion_length
    each = shape.cache_per_token(width)
    why = (
        f"({prompts} x {job.prompt_length} + {sequences} x {job.config.max_completion_length} "
        f"tokens) x {each:,} bytes"
    )
    reading = prompts * job.prompt_length * (5 * shape.intermediate_size) * width
    drawing = sequences * shape.vocab_size * FLOAT32 * sampling_copies(job)
    terms = (
        Term("KV cache", tokens * each, why),
        Term("one layer at work", max(decoding, reading), "reading the prompts, or one token more"),
        Term("drawing a token", drawing, f"{sampling_copies(job)} x {sequences} rows of logits"),
    )
    matrices = one_matrix_term(job)
    return (matrices, *terms) if matrices.bytes else terms


def one_matrix_term(job: Job) -> Term:
    """Return the copies of layers that are one matrix each while a CPU answers (`lora_layers`)."""
    shape, config = job.shape, job.config
    names = config.target_modules if job.width == FLOAT32 else ()
    names = shape.linear_layers if config.load_in_4bit else names
    sizes = [math.prod(shape.linear_layers[name]) for name in names]
    size = shape.layers * sum(sizes) * job.width * (job.device == "cpu")
    return Term("one matrix a layer", size, "base and adapter added up while a CPU answers")


def generate_terms(job: Job, sequences: int) -> tuple[Term, ...]:
    """Return what transformers' `generate` holds: it copies a layer's keys at every token."""
    shape = job.shape
    repeated = 2 * shape.q_dim * (shape.kv_heads < shape.heads)
    decoding = sequences * job.sequence_length * (shape.kv_dim + repeated) * job.width
    return sampling_terms(job, sequences, sequences, decoding)


def shared_terms(job: Job) -> tuple[Term, ...]:
    """Return what `shared_sampling` holds: copies of each query's scores, and no key twice."""
    config, sequences = job.config, job.config.completions_per_step
    scores = sequences * job.sequence_length * job.shape.heads * FLOAT32 * SCORE_COPIES
    return sampling_terms(job, config.prompts_per_step, sequences, scores)


def rollout_phases(job: Job) -> tuple[Phase, ...]:
    """Return the phases in which completions are written, for training and for evaluation."""
    if job.has_vllm:
        return (Phase("generation", vllm_terms(job)),)
    answered = min(job.config.eval_batch_size, job.config.num_eval_items or 10**9)
    sampled = generate_terms(job, job.config.completions_per_step)
    return (
        Phase("generation", shared_terms(job) if job.packs else sampled),
        Phase("evaluation", generate_terms(job, answered)),
    )


def loading_phase(job: Job) -> Phase:
    """Return what reading the weights takes beside the weights: the file's own copy of them."""
    shape = job.shape
    read = shape.parameters * shape.stored_bytes
    return Phase("loading", (Term("weights as stored", read, "read from the file, then let go"),))


def resident_vllm(job: Job) -> tuple[Term, ...]:
    """Return what vLLM keeps while it sleeps: CUDA graphs; its CPU build sleeps not at all."""
    if not job.has_vllm:
        return ()
    if job.device == "cuda":
        return (Term("CUDA graphs", VLLM_GRAPHS, "estimate of vLLM's; not yet measured here"),)
    library = Term("vLLM's libraries", VLLM_ON_CPU, "estimate; not yet measured here")
    return (library, *vllm_terms(job))


def predict(job: Job) -> Prediction:
    """Return what a run holds, phase by phase."""
    always = (*always_terms(job), *resident_vllm(job))
    phases: tuple[Phase, ...] = packed_phases(job) if job.packs else update_phases(job)
    if job.device == "cpu":
        phases = (*phases, loading_phase(job))
    if not (job.has_vllm and job.device == "cpu"):
        phases = (*rollout_phases(job), *phases)
    return Prediction(always, phases)
