"""One question becomes one completion that streams: by the adapter, or by its base with the adapter
off, so that one model is in memory.

The prompt is the training prompt, the end every token that ends a turn.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from lora_grpo.data.prompt import build_messages, count_tokens, render
from lora_grpo.deploy.source import ChatSource
from lora_grpo.policy.base import choose_placement, load_adapter, load_base, read_config
from lora_grpo.policy.generate import Completion, cut_at_end, greedy_settings
from lora_grpo.policy.layers import one_matrix

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from lora_grpo.tasks.task import Task

Say = Callable[[str, str], None]
SIDES = ("base", "adapter")


@dataclass(frozen=True)
class Decoding:
    """How a completion is drawn; at temperature 0 greedily."""

    max_completion_length: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def build_prompt(source: ChatSource, question: str, max_completion_length: int) -> str:
    """Return a question as training asked it, rendered.

    Raises:
        ValueError: prompt and completion together are longer than the model can see.
    """
    prompt = render(source.tokenizer, build_messages(question, source.style))
    (tokens,) = count_tokens(source.tokenizer, [prompt])
    positions = read_config(source.weights).get_text_config().max_position_embeddings
    if tokens + max_completion_length > positions:
        raise ValueError(
            f"the question comes to a prompt of {tokens} tokens, and with a completion of up "
            f"to {max_completion_length} the model sees {positions}: shorten it or "
            "--max-completion-length"
        )
    return prompt


class WordStreamer(TextStreamer):
    """Passes a completion on, word by word, in place of printing it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.say(text)


class ChatModel:
    """A loaded model that answers one question at a time, each with the next seed.

    `sides` are those that answer: the adapter (or the whole model), with `compare` the base too.
    """

    def __init__(self, source: ChatSource, decoding: Decoding, compare: bool = False) -> None:
        self.source, self.decoding, self.asked = source, decoding, 0
        self.sides = SIDES if compare else SIDES[1:]
        model = load_base(
            source.weights, choose_placement(), source.load_in_4bit, source.record.double_quant
        )
        if source.adapter_dir is not None:
            model = load_adapter(model, source.adapter_dir)
        self.model = model.eval()

    @property
    def task(self) -> "Task":
        """What reads the answers."""
        return self.source.task

    def answer(self, question: str, say: Say = lambda side, text: None) -> dict[str, Completion]:
        """Return the completion of each side; `say` hears of it word by word.

        All sides draw with the same seed, so that one alone says what it says beside the other.
        """
        prompt = build_prompt(self.source, question, self.decoding.max_completion_length)
        seed, self.asked = self.decoding.seed + self.asked, self.asked + 1
        return {side: self._complete(prompt, side, seed, say) for side in self.sides}

    def _complete(self, prompt: str, side: str, seed: int, say: Say) -> Completion:
        tokenizer, prefill = self.source.tokenizer, self.source.style.prefill
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        settings = self._settings()
        say(side, prefill)
        torch.manual_seed(seed)
        bare = self.model.disable_adapter() if side == "base" else nullcontext()
        with bare, one_matrix(self.model), torch.no_grad():
            output = self.model.generate(
                **inputs.to(self.model.device),
                generation_config=settings,
                streamer=WordStreamer(tokenizer, lambda text: say(side, text)),
            )
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        ids, truncated = cut_at_end(written, settings.eos_token_id)
        text = prefill + tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, len(ids), truncated)

    def _settings(self) -> "GenerationConfig":
        decoding = self.decoding
        settings = greedy_settings(
            self.model, self.source.tokenizer, decoding.max_completion_length
        )
        if decoding.temperature > 0:
            # Training sampled from the whole distribution, whatever the base's own file says.
            settings.update(
                do_sample=True, temperature=decoding.temperature, top_p=decoding.top_p, top_k=0
            )
        return settings
