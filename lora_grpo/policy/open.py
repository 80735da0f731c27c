"""The policy in use: a base, later with an adapter, that answers prompts as it is at that moment.

`TransformersPolicy` generates with the model itself, `VLLMPolicy` through an engine. `open_policy`
gives the one that was chosen, and closes what it opened however the run ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_grpo.policy.base import Placement, declared_end_ids, load_adapter, load_base
from lora_grpo.policy.generate import Advance, Completion, complete

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_grpo.policy.vllm import Engine, EngineSettings


class Policy(Protocol):
    """A base, and its adapter once there is one."""

    model: "PreTrainedModel | PeftModel | None"

    def complete(
        self, prompts: list[str], max_completion_length: int, advance: Advance
    ) -> list[Completion]:
        """Answer each rendered prompt greedily, in their order."""

    def use_adapter(self, directory: Path) -> None:
        """Answer with this adapter on the base from now on."""

    def follow(self, model: "PeftModel") -> None:
        """Answer as the adapter in training is at each moment."""

    def abort(self) -> None:
        """Forget what an engine was generating when an error came."""


class TransformersPolicy:
    """Answers by transformers' own generate."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int
    ) -> None:
        from lora_grpo.machine.out_of_memory import RowLimit

        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.limit = RowLimit("evaluation", print)

    def complete(
        self, prompts: list[str], max_completion_length: int, advance: Advance
    ) -> list[Completion]:
        return complete(
            self.model,
            self.tokenizer,
            prompts,
            max_completion_length,
            self.batch_size,
            advance,
            self.limit,
        )

    def use_adapter(self, directory: Path) -> None:
        self.model = load_adapter(self.model, directory)

    def follow(self, model: "PeftModel") -> None:
        self.model = model

    def abort(self) -> None:
        pass


class VLLMPolicy:
    """Answers by vLLM; `model` is what is trained beside it, if anything is."""

    def __init__(
        self,
        engine: "Engine",
        tokenizer: "PreTrainedTokenizerBase",
        model: "PreTrainedModel | None",
    ) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, model
        self.following = False

    def complete(
        self, prompts: list[str], max_completion_length: int, advance: Advance
    ) -> list[Completion]:
        if self.following:
            self.engine.sync(self.model)
        return self.engine.complete(self.tokenizer, prompts, max_completion_length, advance)

    def use_adapter(self, directory: Path) -> None:
        self.engine.use_adapter(directory)

    def follow(self, model: "PeftModel") -> None:
        self.model, self.following = model, True

    def abort(self) -> None:
        self.engine.abort()


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
    """Hold a policy on the transformers backend while the block runs.

    With `engine` it answers through vLLM, and the model itself is loaded only to be trained, or on
    a CPU to hand vLLM the weights that 4-bit comes to.
    """
    ends = declared_end_ids(folder, tokenizer)
    if engine is None:
        base = load_base(folder, placement, load_in_4bit, double_quant)
        base.generation_config.eos_token_id = ends
        yield TransformersPolicy(base, tokenizer, batch_size)
        return
    from lora_grpo.policy.vllm import open_engine

    needed = to_train or (load_in_4bit and placement.device == "cpu")
    base = load_base(folder, placement, load_in_4bit, double_quant) if needed else None
    if base is not None:
        base.generation_config.eos_token_id = ends
    with open_engine(folder, engine, ends, base) as opened:
        yield VLLMPolicy(opened, tokenizer, base if to_train else None)
