"""The memory of loading and of sampling, by vLLM or by the model itself, and a run's prediction."""

import math
from dataclasses import replace

from lora_grpo.memory.terms import (
    FLOAT32,
    GIB,
    Job,
    Phase,
    Prediction,
    Term,
    adapter_terms,
    process_terms,
    weight_terms,
)
from lora_grpo.memory.update import update_phases
from lora_grpo.policy.vllm import VLLM_BATCH_TOKENS

SAMPLING_COPIES = 4  # logits, processed scores, probabilities, and the draw
SORTING_COPIES = 4  # top_p also sorts: values, 8-byte positions, their sum
SCORE_COPIES = 4  # of the prompt, joined with the completion's own, scaled, and their softmax
VLLM_GRAPHS = 2 * GIB // 5
VLLM_ON_CPU = GIB // 2
BLOCK = 16  # tokens of a KV cache page


def sequences_in_flight(job: Job) -> int:
    """Return the completions that vLLM writes at once."""
    return job.config.vllm_max_num_seqs or job.config.completions_per_step


def vllm_cache_term(job: Job, sequences: int) -> Term:
    """Return the KV cache that vLLM needs for that many sequences at full length."""
    limit = job.config.max_prompt_length + job.config.max_completion_length
    tokens, each = sequences * -(-limit // BLOCK) * BLOCK, job.shape.cache_per_token(job.width)
    why = f"{sequences} sequences x {limit} tokens x {each:,} bytes"
    return Term("vLLM's KV cache", tokens * each, why)


def vllm_own_terms(job: Job) -> tuple[Term, ...]:
    """Return what vLLM holds beside its cache: weights of its own, its adapter, activations."""
    shape, width = job.shape, job.width
    profiled = VLLM_BATCH_TOKENS * (3 * shape.intermediate_size + 4 * shape.hidden_size) * width
    sampled = sequences_in_flight(job) * shape.vocab_size * FLOAT32 * SAMPLING_COPIES
    own = Term("vLLM's adapter", job.lora_parameters * width, "one LoRA slot in the compute type")
    working = Term("vLLM's activations", profiled + sampled, "estimate: 8192 tokens, and sampling")
    if job.shares_weights:
        return own, working
    in_4bit = job.config.load_in_4bit and job.device == "cuda"
    kept = replace(job, config=replace(job.config, load_in_4bit=in_4bit))
    size = sum(term.bytes for term in weight_terms(kept))
    return Term("vLLM's weights", size, "its own: this backend does not share them"), own, working


def vllm_share(job: Job, sequences: int) -> float:
    """Return the `gpu_memory_utilization` that holds vLLM's weights, cache and activations."""
    terms = [*vllm_own_terms(job), vllm_cache_term(job, sequences)]
    if job.shares_weights:
        terms += weight_terms(job)
    return sum(term.bytes for term in terms) / job.total_bytes


def vllm_terms(job: Job) -> tuple[Term, ...]:
    """Return what vLLM holds while it samples; a given share of the card leaves the rest of it for
    the cache, at least one sequence's."""
    share = job.config.vllm_gpu_memory_utilization
    if share is None or job.total_bytes is None:
        return (*vllm_own_terms(job), vllm_cache_term(job, sequences_in_flight(job)))
    left = int((share - vllm_share(job, 0)) * job.total_bytes)
    size = max(left, vllm_cache_term(job, 1).bytes)
    why = f"what a share of {share:.2f} of the card leaves for it"
    return (*vllm_own_terms(job), Term("vLLM's KV cache", size, why))


def one_matrix_term(job: Job) -> Term:
    """Return the copies of layers that are one matrix each while a CPU samples."""
    shape, config = job.shape, job.config
    names = config.target_modules if job.width == FLOAT32 else ()
    names = shape.linear_layers if config.load_in_4bit else names
    size = shape.layers * sum(math.prod(shape.linear_layers[name]) for name in names) * job.width
    why = "base and adapter added up while a CPU samples"
    return Term("one matrix a layer", size * (job.device == "cpu"), why)


def sampling_phase(job: Job, name: str, sequences: int, shared: bool) -> Phase:
    """Return what sampling by the model itself holds at the end of its longest completion.

    `shared` holds each prompt once, and copies of each query's scores (`policy.sampling`);
    transformers' `generate` holds it for each completion, and copies a layer's keys every time.
    """
    config, shape, width = job.config, job.shape, job.width
    prompts = config.prompts_per_step if shared else sequences
    length, each = config.max_completion_length, shape.cache_per_token(width)
    cache = (prompts * job.prompt_length + sequences * length) * each
    why = f"({prompts} x {job.prompt_length} + {sequences} x {length} tokens) x {each:,} bytes"
    scores = shape.heads * FLOAT32 * SCORE_COPIES
    copied = (shape.kv_dim + 2 * shape.q_dim * (shape.kv_heads < shape.heads)) * width
    decoding = sequences * job.sequence_length * (scores if shared else copied)
    reading = prompts * job.prompt_length * 5 * shape.intermediate_size * width
    copies = SAMPLING_COPIES + SORTING_COPIES * (config.top_p < 1)
    drawing = copies * sequences * shape.vocab_size * FLOAT32
    terms = (
        one_matrix_term(job),
        Term("KV cache", cache, why),
        Term("one layer at work", max(decoding, reading), "reading the prompts, or one token"),
        Term("drawing a token", drawing, f"{copies} x {sequences} rows of logits"),
    )
    return Phase(name, terms)


def predict(job: Job) -> Prediction:
    """Return what a run holds, phase by phase."""
    config, on_gpu = job.config, job.device == "cuda"
    always = (*process_terms(job), *weight_terms(job), *adapter_terms(job))
    phases = update_phases(job)
    if job.rollout != "vllm":
        answered = min(config.eval_batch_size, config.num_eval_items or config.eval_batch_size)
        training = sampling_phase(job, "generation", config.completions_per_step, job.packs)
        phases = (training, sampling_phase(job, "evaluation", answered, False), *phases)
    elif on_gpu:
        graphs = Term("CUDA graphs", VLLM_GRAPHS, "estimate of vLLM's; not yet measured here")
        always = (*always, graphs)
        phases = (Phase("generation", vllm_terms(job)), *phases)
    else:  # vLLM's CPU build does not sleep
        library = Term("vLLM's libraries", VLLM_ON_CPU, "estimate; not yet measured here")
        always = (*always, library, *vllm_terms(job))
    if not on_gpu:
        read = job.shape.parameters * job.shape.stored_bytes
        loading = Term("weights as stored", read, "read from the file, then let go")
        phases = (*phases, Phase("loading", (loading,)))
    return Prediction(always, phases)
