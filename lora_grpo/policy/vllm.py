"""vLLM in this process: the base's weights, and the policy's adapter sent as a LoRA request.

Only the adapter ever moves: each sync writes it to a temporary folder and loads it under a new
name, so the base's weights, 4-bit ones included, never change. Checked against vLLM 0.30.0.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.policy.adapter import save_adapter
from lora_grpo.policy.base import Placement, read_config, write_dequantised
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.generate import Advance, Completion, cut_at_end

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

VLLM_BATCH_TOKENS = 8192  # tokens at once with which vLLM profiles its activations
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can set aside
CPU_BLOCK = 128  # tokens in a page of the cache


@dataclass(frozen=True)
class EngineSettings:
    """The engine's limits: tokens per sequence, sequences at once, the rank and the memory."""

    placement: Placement
    max_model_len: int
    max_num_seqs: int
    max_lora_rank: int
    load_in_4bit: bool
    gpu_memory_utilization: float | None = None
    seed: int = 0


def engine_settings(config: TrainConfig, placement: Placement) -> EngineSettings:
    """Return the engine's settings for a training run."""
    return EngineSettings(
        placement=placement,
        max_model_len=config.max_sequence_length,
        max_num_seqs=config.vllm_max_num_seqs or config.completions_per_step,
        max_lora_rank=allowed_rank(config.r),
        load_in_4bit=config.load_in_4bit,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        seed=config.seed,
    )


def allowed_rank(r: int) -> int:
    """Return the smallest rank of vLLM's that holds adapters of rank `r`.

    Raises:
        ValueError: `r` is larger than all of them.
    """
    for rank in RANKS:
        if r <= rank:
            return rank
    raise ValueError(f"--r {r}: vLLM serves ranks of up to {RANKS[-1]}; use --rollout generate")


def check_positions(config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError where prompt and completion together are longer than the model can see:
    vLLM would refuse them, and Unsloth would change the model's positions."""
    known = read_config(folder).get_text_config().max_position_embeddings
    if config.max_sequence_length > known:
        raise ValueError(
            "--max-prompt-length + --max-completion-length come to "
            f"{config.max_sequence_length}, and --model {config.model} knows {known} positions: "
            "make them shorter"
        )


def cache_bytes(folder: Path, settings: EngineSettings) -> int:
    """Return the bytes of a float32 KV cache for all sequences at their full length."""
    config = read_config(folder).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    blocks = math.ceil(settings.max_model_len / CPU_BLOCK) * settings.max_num_seqs + 2
    return token * blocks * CPU_BLOCK


PREFIX = "lora_grpo-"  # of temporary folders
AT_ONCE = 4  # sequences given to vLLM at a time, per sequence that it writes at once


class Engine:
    """vLLM with one base and the newest adapter; asleep between uses where the GPU can."""

    def __init__(self, folder: Path, settings: EngineSettings, end_ids: Sequence[int]) -> None:
        self.settings, self.end_ids = settings, list(end_ids)
        self.folder = TemporaryDirectory(prefix=PREFIX)
        self.request: LoRARequest | None = None
        self.syncs = 0
        self.llm: LLM | None = None
        self.on_gpu = settings.placement.device == "cuda"
        self.asleep = False
        try:
            self.llm = self._start(folder)
            self.sleep()
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path) -> "LLM":
        from vllm import LLM

        settings, on_gpu = self.settings, self.on_gpu
        memory = (
            {"gpu_memory_utilization": settings.gpu_memory_utilization or 0.5}
            if on_gpu
            else {"kv_cache_memory_bytes": cache_bytes(folder, settings), "enforce_eager": True}
        )
        return LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=settings.placement.dtype,
            quantization="bitsandbytes" if on_gpu and settings.load_in_4bit else None,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            # What the memory plan counts with; a large card's own default is twice that.
            max_num_batched_tokens=max(VLLM_BATCH_TOKENS, settings.max_model_len),
            enable_lora=True,
            max_lora_rank=settings.max_lora_rank,
            max_loras=1,
            enable_prefix_caching=True,
            enable_sleep_mode=on_gpu,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            seed=settings.seed,
            use_tqdm_on_load=False,
            **memory,
        )

    def sleep(self) -> None:
        """Free the cache, and move the weights to the machine's memory, until `awake`."""
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep weights and cache on the GPU during the block."""
        if self.asleep:
            from lora_grpo.machine.out_of_memory import release_memory

            release_memory()
            self.llm.wake_up()
            self.asleep = False
        try:
            yield
        finally:
            self.sleep()

    def use_adapter(self, directory: Path) -> None:
        """Generate with the adapter in this directory from now on."""
        from vllm.lora.request import LoRARequest

        self.syncs += 1
        self.request = LoRARequest(f"policy-{self.syncs}", self.syncs, str(directory))

    def sync(self, model: "PeftModel") -> None:
        """Generate with the model's adapter as it is now, written and loaded under a new name."""
        directory = Path(self.folder.name) / f"policy-{self.syncs + 1}"
        shutil.rmtree(Path(self.folder.name) / f"policy-{self.syncs}", ignore_errors=True)
        save_adapter(model, directory)
        self.use_adapter(directory)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: "SamplingParams | Sequence[SamplingParams]",
    ) -> "list[RequestOutput]":
        """Return vLLM's outputs for prompts of token ids, with the newest adapter, if any."""
        with self.awake():
            return self.llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts],
                sampling_params=params,
                lora_request=self.request,
                use_tqdm=False,
            )

    def sample(
        self, prompts: Sequence[Sequence[int]], seed: int, **settings: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample a completion for each prompt; return token ids and their log-probs, (B, T) each.

        The draw depends on `seed` alone and does not change this process's random state.
        """
        import torch
        from vllm import SamplingParams

        params = SamplingParams(
            n=1, logprobs=0, stop_token_ids=self.end_ids, detokenize=False, **settings
        )
        devices = [torch.cuda.current_device()] if self.on_gpu else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            outputs = [request.outputs[0] for request in self.generate(prompts, params)]
        ids = [list(output.token_ids) for output in outputs]
        logprobs = [
            [chosen[token].logprob for token, chosen in zip(row, output.logprobs, strict=True)]
            for row, output in zip(ids, outputs, strict=True)
        ]
        return ids, logprobs

    def complete(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: list[str],
        max_completion_length: int,
        advance: Advance = lambda count: None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Complete each rendered prompt greedily, or sample several completions of each; in the
        given order, the samples of one prompt adjacent."""
        chunk = AT_ONCE * self.settings.max_num_seqs
        return complete_in_chunks(
            tokenizer,
            prompts,
            self.end_ids,
            max_completion_length,
            chunk,
            self.generate,
            advance,
            sampling,
        )

    def abort(self) -> None:
        """Drop the requests that an error interrupted."""
        abort_requests(self.llm)

    def close(self) -> None:
        """Give the engine's memory back; safe to call twice."""
        from vllm.distributed import cleanup_dist_env_and_memory

        # An error here must not hide an earlier one.
        with suppress(Exception):
            if self.llm is not None:
                self.abort()
                self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        with suppress(Exception):
            cleanup_dist_env_and_memory()
        self.folder.cleanup()


def abort_requests(llm: "LLM") -> None:
    """Drop every request that a vLLM has not finished."""
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)


def complete_in_chunks(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    end_ids: list[int],
    max_completion_length: int,
    chunk: int,
    generate: Callable[[list[list[int]], Any], "list[RequestOutput]"],
    advance: Advance,
    sampling: Sampling | None = None,
) -> list[Completion]:
    """Complete rendered prompts with a vLLM, greedily or as `sampling` says, `chunk` completions at
    a time, so that progress can be shown."""
    from vllm import SamplingParams

    def params(**drawn: Any) -> "SamplingParams":
        return SamplingParams(
            max_tokens=max_completion_length, stop_token_ids=end_ids, detokenize=False, **drawn
        )

    def sampled(prompt: int) -> "SamplingParams":
        seed = sampling.prompt_seed(prompt)
        return params(n=each, temperature=sampling.temperature, seed=seed)

    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    each = sampling.num_samples if sampling else 1
    size, completions = max(1, chunk // each), []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        drawn = [sampled(start + index) for index in range(len(part))] if sampling else None
        for request in generate(part, drawn or params(temperature=0.0)):
            for output in request.outputs:
                row, truncated = cut_at_end(list(output.token_ids), end_ids)
                text = tokenizer.decode(row, skip_special_tokens=True)
                completions.append(Completion(text, len(row), truncated))
        advance(len(part) * each)
    return completions


@contextmanager
def open_engine(
    folder: Path,
    settings: EngineSettings,
    end_ids: Sequence[int],
    base: "PreTrainedModel | None" = None,
) -> Iterator[Engine]:
    """Open an engine for the block, and shut it down however the block ends.

    vLLM's CPU build cannot read 4-bit weights, so a 4-bit `base` is written dequantised for it: the
    same numbers, so the same policy.
    """
    with ExitStack() as until_loaded:
        if base is not None and settings.load_in_4bit and settings.placement.device == "cpu":
            scratch = until_loaded.enter_context(TemporaryDirectory(prefix=PREFIX))
            folder = write_dequantised(base, folder, Path(scratch) / "base")
        engine = Engine(folder, settings, end_ids)
    try:
        yield engine
    finally:
        engine.close()
