"""Log-probs of chosen tokens and entropies from hidden states, without ever holding (N, V) logits.

The output layer is computed in tiles of the vocabulary with a running maximum, as FlashAttention
does for attention (Dao et al. 2022, arXiv 2205.14135). The gradient of a log-prob with respect to
its hidden state is one vector, (W[target] - sum p W) / temperature, which is accumulated in the
same pass: the backward pass multiplies it by one number per token and computes no logits again.
"""

import torch

TOKENS, VOCABULARY = 1024, 4096  # a float32 tile has 16 MB


class TiledLogProbs(torch.autograd.Function):
    """Map `(hidden (N, H), weight (V, H), targets (N,), temperature)` to log-probs and entropies
    (N,).

    Only the log-probs have a gradient, and only with respect to `hidden`.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        parts = [
            one_block(rows, weight, chosen, temperature, wanted)
            for rows, chosen in zip(hidden.split(TOKENS), targets.split(TOKENS), strict=True)
        ]
        logps, entropies = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        if wanted:
            ctx.save_for_backward(torch.cat([part[2] for part in parts]))
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_logps: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return (grad_logps[:, None] * direction).to(ctx.dtype), None, None, None


def one_block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return log-probs, entropies (N,) and, if `wanted`, the log-probs' gradients (N, H)."""
    device = hidden.device.type
    in_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if in_autocast else hidden.dtype
    hidden = hidden.to(dtype)
    tile_rows = min(VOCABULARY, len(weight))
    buffer = hidden.new_empty(len(hidden), tile_rows)
    top = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    total, weighted, chosen = (torch.zeros_like(top) for _ in range(3))
    mean = torch.zeros(hidden.shape, device=hidden.device) if wanted else None
    for start in range(0, len(weight), tile_rows):
        tile = weight[start : start + tile_rows].to(dtype)
        logits = torch.mm(hidden, tile.T, out=buffer[:, : len(tile)])
        logits = logits.float().div_(temperature)
        inside = (targets >= start) & (targets < start + len(tile))
        local = (targets - start).clamp(0, len(tile) - 1)
        chosen += logits.gather(1, local[:, None])[:, 0] * inside
        higher = torch.maximum(top, logits.amax(1))
        shrink, top = torch.exp(top - higher), higher
        odds = (logits - top[:, None]).exp_()
        total.mul_(shrink).add_(odds.sum(1))
        weighted.mul_(shrink).add_(logits.mul_(odds).sum(1))
        if mean is not None:
            mean.mul_(shrink[:, None]).add_(odds.to(dtype) @ tile)
    log_total = top + total.log()
    if mean is not None:
        mean.div_(-total[:, None]).add_(weight[targets]).div_(temperature)
    return chosen - log_total, log_total - weighted / total, mean
