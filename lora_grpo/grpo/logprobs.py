"""Log-probs of chosen tokens and entropies from hidden states, without ever holding (N, V) logits.

The output layer is computed in tiles of the vocabulary with a running maximum, as FlashAttention
does for attention (Dao et al. 2022, arXiv 2205.14135). The gradient of a log-prob with respect to
its hidden state is one vector, (W[target] - sum p W) / temperature, which is accumulated in the
same pass: the backward pass multiplies it by one number per token and computes no logits again. So
is that of an entropy, -sum p (log p + entropy) W / temperature, where a loss has an entropy bonus.
"""

import torch

TOKENS, VOCABULARY = 1024, 4096  # a float32 tile has 16 MB


class TiledLogProbs(torch.autograd.Function):
    """Map `(hidden (N, H), weight (V, H), targets (N,), temperature, entropy_gradient=False)` to
    log-probs and entropies (N,).

    Log-probs have a gradient with respect to `hidden`; entropies only if `entropy_gradient`.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradients = ctx.needs_input_grad[0] * (1 + entropy_gradient)
        parts = [
            one_block(rows, weight, chosen, temperature, gradients)
            for rows, chosen in zip(hidden.split(TOKENS), targets.split(TOKENS), strict=True)
        ]
        logps, entropies, *directions = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(*directions)
        ctx.dtype = hidden.dtype
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_logps: torch.Tensor,
        grad_entropies: torch.Tensor,
    ) -> tuple[torch.Tensor, None, None, None, None]:
        direction, *of_entropy = ctx.saved_tensors
        found = grad_logps[:, None] * direction
        for other in of_entropy:
            found.addcmul_(grad_entropies[:, None], other)
        return found.to(ctx.dtype), None, None, None, None


def one_block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    gradients: int,
) -> list[torch.Tensor]:
    """Return log-probs, entropies (N,) and the first `gradients` of the log-probs' and the
    entropies' gradients (N, H)."""
    device = hidden.device.type
    in_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if in_autocast else hidden.dtype
    hidden = hidden.to(dtype)
    tile_rows = min(VOCABULARY, len(weight))
    buffer = hidden.new_empty(len(hidden), tile_rows)
    top = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    total, weighted, chosen = (torch.zeros_like(top) for _ in range(3))
    # Sums over the vocabulary of odds x W, and of odds x (logit - top) x W.
    sums = [torch.zeros(hidden.shape, device=hidden.device) for _ in range(gradients)]
    for start in range(0, len(weight), tile_rows):
        tile = weight[start : start + tile_rows].to(dtype)
        logits = torch.mm(hidden, tile.T, out=buffer[:, : len(tile)])
        logits = logits.float().div_(temperature)
        inside = (targets >= start) & (targets < start + len(tile))
        local = (targets - start).clamp(0, len(tile) - 1)
        chosen += logits.gather(1, local[:, None])[:, 0] * inside
        higher = torch.maximum(top, logits.amax(1))
        shrink, drop = torch.exp(top - higher), torch.nan_to_num(top - higher, neginf=0.0)
        top = higher
        odds = logits.sub_(top[:, None]).exp()
        products = logits.mul_(odds)
        weighted.add_(total * drop).mul_(shrink).add_(products.sum(1))
        total.mul_(shrink).add_(odds.sum(1))
        if gradients > 1:
            sums[1].addcmul_(sums[0], drop[:, None]).mul_(shrink[:, None])
            sums[1].add_(products.to(dtype) @ tile)
        if gradients:
            sums[0].mul_(shrink[:, None]).add_(odds.to(dtype) @ tile)
    below = weighted / total  # the mean of logit - top
    if gradients > 1:
        sums[1].addcmul_(sums[0], below[:, None], value=-1).div_(-temperature * total[:, None])
    if gradients:
        sums[0].div_(-total[:, None]).add_(weight[targets]).div_(temperature)
    return [chosen - top - total.log(), total.log() - below, *sums]
