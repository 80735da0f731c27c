"""One question becomes one completion that streams: by the adapter, or by its base with the adapter
off, so that one model is in memory.

The prompt is the training prompt, the end every token that ends a turn.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_grpo.data.prompt import PromptStyle, build_messages, count_tokens, render
from lora_grpo.deploy.source import ChatSource
from lora_grpo.policy.base import choose_placement, load_adapter, load_base, read_config
from lora_grpo.policy.generate import Completion, cut_at_end, greedy_settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]


@dataclass(frozen=True)
class Decoding:
    """How a completion is drawn; at temperature 0 greedily."""

    max_completion_length: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompter:
    """Puts a question as it was put in training; `positions` is how many tokens the model sees."""

    tokenizer: "PreTrainedTokenizerBase"
    style: PromptStyle
    max_completion_length: int
    positions: int

    def prompt(self, question: str) -> str:
        """Return the rendered prompt.

        Raises:
            ValueError: prompt and completion together are longer than the model can see.
        """
        prompt = render(self.tokenizer, build_messages(question, self.style))
        (tokens,) = count_tokens(self.tokenizer, [prompt])
        if tokens + self.max_completion_length > self.positions:
            raise ValueError(
                f"the question comes to a prompt of {tokens} tokens, and with a completion of up "
                f"to {self.max_completion_length} the model sees {self.positions}: shorten it or "
                "--max-completion-length"
            )
        return prompt


def make_prompter(source: ChatSource, max_completion_length: int) -> Prompter:
    """Return the prompter of a model, whose weights need not be loaded."""
    config = read_config(source.weights).get_text_config()
    positions = config.max_position_embeddings
    return Prompter(source.tokenizer, source.style, max_completion_length, positions)


class TextStream:
    """What `generate` calls a streamer: hands on the text that each new token makes certain."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", say: Say) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.ids: list[int] = []
        self.said = ""
        self.has_prompt = False

    def put(self, ids: "torch.Tensor") -> None:
        """Take the prompt first, then a token at a time."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of which bytes are missing still
            self._say_rest(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._say_rest(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _say_rest(self, text: str) -> None:
        if len(text) > len(self.said):
            self.say(text[len(self.said) :])
            self.said = text


class ChatModel:
    """A loaded model that answers one question at a time."""

    def __init__(
        self, model: "PreTrainedModel | PeftModel", prompter: Prompter, decoding: Decoding
    ) -> None:
        self.model, self.prompter, self.decoding = model, prompter, decoding
        self.asked = 0

    def answer(self, question: str, sides: dict[str, Say]) -> dict[str, Completion]:
        """Answer a question as each side named, `base` with the adapter off, and stream each.

        Both sides draw with the same seed, so that one alone says what it says beside the other.
        """
        prompt = self.prompter.prompt(question)
        seed, self.asked = self.decoding.seed + self.asked, self.asked + 1
        return {side: self._complete(prompt, side, seed, say) for side, say in sides.items()}

    def _complete(self, prompt: str, side: str, seed: int, say: Say) -> Completion:
        import torch

        from lora_grpo.policy.layers import one_matrix

        tokenizer = self.prompter.tokenizer
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        settings, stream = self._settings(), TextStream(tokenizer, say)
        if prefill := self.prompter.style.prefill:
            say(prefill)
        torch.manual_seed(seed)
        bare = self.model.disable_adapter() if side == "base" else nullcontext()
        with bare, one_matrix(self.model), torch.no_grad():
            self.model.generate(
                **inputs.to(self.model.device), generation_config=settings, streamer=stream
            )
        ids, truncated = cut_at_end(stream.ids, settings.eos_token_id)
        return Completion(prefill + stream.said, len(ids), truncated)

    def _settings(self) -> "GenerationConfig":
        decoding = self.decoding
        settings = greedy_settings(
            self.model, self.prompter.tokenizer, decoding.max_completion_length
        )
        if decoding.temperature > 0:
            # Training sampled from the whole distribution, whatever the base's own file says.
            settings.update(
                do_sample=True, temperature=decoding.temperature, top_p=decoding.top_p, top_k=0
            )
        return settings


@contextmanager
def open_chat(source: ChatSource, prompter: Prompter, decoding: Decoding) -> Iterator[ChatModel]:
    """Hold the loaded model while the block runs."""
    placement = choose_placement()
    model = load_base(source.weights, placement, source.load_in_4bit, source.record.double_quant)
    if source.adapter_dir is not None:
        model = load_adapter(model, source.adapter_dir)
    model.eval()
    yield ChatModel(model, prompter, decoding)
