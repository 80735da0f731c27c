"""Drawing tokens: from probabilities, and for an evaluation's samples with numbers that depend on
nothing but the seed, the prompt's position and the sample's.

So a sample stays the same with another batch size, more problems, or more samples per problem.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """Sample `num_samples` completions per prompt, from all tokens (no top-p, no top-k)."""

    num_samples: int
    temperature: float
    seed: int

    def prompt_seed(self, prompt: int) -> int:
        """Return the seed of a prompt's first sample; the next ones add 1 each, as vLLM's do."""
        return random.Random(f"{self.seed}/{prompt}").getrandbits(48)

    def row_seed(self, row: int) -> int:
        """Return the seed of a sample, where those of one prompt are adjacent rows."""
        prompt, sample = divmod(row, self.num_samples)
        return self.prompt_seed(prompt) + sample


class SeededDraws:
    """A logits processor for `generate` with greedy decoding: it draws each row's next token and
    leaves only that one to choose."""

    def __init__(self, sampling: Sampling, rows: Sequence[int], length: int) -> None:
        """Prepare the numbers of up to `length` tokens for each of the given rows."""
        import torch

        self.temperature, self.drawn = sampling.temperature, 0
        streams = [torch.Generator().manual_seed(sampling.row_seed(row)) for row in rows]
        numbers = [torch.rand(length, dtype=torch.float64, generator=each) for each in streams]
        self.numbers = torch.stack(numbers)  # (B, T)

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return scores (B, V) of minus infinity for all but the drawn tokens."""
        import torch

        numbers = self.numbers[:, self.drawn, None].to(scores.device)
        tokens = draw((scores.float() / self.temperature).softmax(-1), numbers)
        self.drawn += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def draw(probabilities: "torch.Tensor", numbers: "torch.Tensor | None" = None) -> "torch.Tensor":
    """Draw one token per row of probabilities (B, V): where their running sum passes a uniform
    number, one of `numbers` (B, 1) or a new one.

    `torch.multinomial` draws V exponential numbers per row, a fifth of a CPU's time per token of a
    small model.

    Raises:
        FloatingPointError: the probabilities are not finite.
    """
    import torch

    reach = probabilities.cumsum(-1, dtype=torch.float64)
    whole = reach[:, -1:]
    if not torch.isfinite(whole).all():
        raise FloatingPointError("the policy's probabilities are not finite")
    if numbers is None:
        numbers = torch.rand(whole.shape, dtype=whole.dtype, device=whole.device)
    return torch.searchsorted(reach, numbers * whole, right=True)[:, 0]
