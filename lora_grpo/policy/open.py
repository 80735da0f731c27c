"""A policy: a base model, later with an adapter, that completes prompts greedily or samples.

`TransformersPolicy` generates with the model itself, `VLLMPolicy` with a vLLM engine. `open_policy`
opens one of the two, and closes it however the block ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.policy.base import Placement, declared_end_ids, load_adapter, load_base
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.generate import Advance, Completion, complete

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_grpo.policy.vllm import Engine, EngineSettings


class TransformersPolicy:
    """Completes prompts with transformers' `generate`."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int
    ) -> None:
        from lora_grpo.machine.out_of_memory import RowLimit

        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.limit = RowLimit("evaluation", print)

    def complete(
        self,
        prompts: list[str],
        max_completion_length: int,
        advance: Advance = lambda count: None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Complete each rendered prompt with the adapter as it is now, greedily or as `sampling`
        says; results are in the order of the prompts, the samples of one adjacent."""
        return complete(
            self.model,
            self.tokenizer,
            prompts,
            max_completion_length,
            self.batch_size,
            advance,
            self.limit,
            sampling,
        )

    def use_adapter(self, directory: Path) -> None:
        """Put the adapter of a directory on the base."""
        self.model = load_adapter(self.model, directory)

    def follow(self, model: "PeftModel") -> None:
        """Use the adapter that is being trained on `model`, as it is at each moment."""
        self.model = model

    def abort(self) -> None:
        """Drop what an engine was generating when an error came; there is no engine here."""


class VLLMPolicy:
    """Completes prompts with vLLM; `model` is the model that is trained beside it, if any.

    The methods are those of `TransformersPolicy`.
    """

    def __init__(
        self,
        engine: "Engine",
        tokenizer: "PreTrainedTokenizerBase",
        model: "PreTrainedModel | None",
    ) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, model
        self.following = False

    def complete(
        self,
        prompts: list[str],
        max_completion_length: int,
        advance: Advance = lambda count: None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        if self.following:
            self.engine.sync(self.model)
        return self.engine.complete(
            self.tokenizer, prompts, max_completion_length, advance, sampling
        )

    def use_adapter(self, directory: Path) -> None:
        self.engine.use_adapter(directory)

    def follow(self, model: "PeftModel") -> None:
        self.model, self.following = model, True

    def abort(self) -> None:
        self.engine.abort()


Policy = TransformersPolicy | VLLMPolicy


@contextmanager
def open_policy(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    placement: Placement,
    load_in_4bit: bool,
    double_quant: bool,
    batch_size: int,
    engine: "EngineSettings | None" = None,
    to_train: bool = False,
) -> Iterator[Policy]:
    """Open a policy of the transformers backend for the block.

    With `engine` vLLM completes the prompts. The model itself is then loaded only if it is to be
    trained, or if vLLM runs on a CPU and needs its 4-bit weights dequantised.
    """
    ends, base = declared_end_ids(folder, tokenizer), None
    if engine is None or to_train or (load_in_4bit and placement.device == "cpu"):
        base = load_base(folder, placement, load_in_4bit, double_quant)
        base.generation_config.eos_token_id = ends
    if engine is None:
        yield TransformersPolicy(base, tokenizer, batch_size)
        return
    from lora_grpo.policy.vllm import open_engine

    with open_engine(folder, engine, ends, base) as opened:
        yield VLLMPolicy(opened, tokenizer, base if to_train else None)
