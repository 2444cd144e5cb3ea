"""Next-token cross-entropy from hidden states: logits = hidden @ weight.T, then their loss, whole or chunk by chunk.

With 50,304 columns the logits are the largest tensor of a GPT-2 step (B=16, T=1024: 3.3 GB in fp32), and on a CPU most
of the step goes into writing and re-reading them. The chunked form computes the gradient together with the loss, one
chunk of tokens at a time in one reused buffer, and so never holds the whole logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy of ``targets`` under ``softmax(hidden @ weight.T)``: a scalar, in nats, fp32.

    Both forms follow the autocast in force as PyTorch's own would: matmuls in its type, softmax and loss in fp32.

    Args:
        hidden: (N, C), final hidden states.
        weight: (V, C), the classifier, one row per token id.
        targets: (N,), the ids to predict.
        chunk_tokens: tokens per chunk; None computes all N at once.
    """
    if chunk_tokens is None:
        return F.cross_entropy(F.linear(hidden, weight), targets)
    return _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, chunk_tokens)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        with torch.autocast(device_type, enabled=False):  # the casts are made by hand below, once
            return _loss_and_gradients(ctx, hidden, weight, targets, chunk_tokens, dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None


def _loss_and_gradients(
    ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, dtype: torch.dtype
) -> Tensor:
    N, V = len(hidden), len(weight)
    want_gradients = any(ctx.needs_input_grad)
    h, w = hidden.to(dtype), weight.to(dtype)
    buffer = torch.empty(min(chunk_tokens, N), V, dtype=dtype, device=h.device)
    row = torch.arange(len(buffer), device=h.device)
    loss = torch.zeros((), device=h.device)
    grad_hidden = torch.empty_like(hidden) if want_gradients else None
    grad_weight = torch.zeros_like(weight) if want_gradients else None
    for start in range(0, N, chunk_tokens):
        h_chunk, t_chunk = h[start : start + chunk_tokens], targets[start : start + chunk_tokens]
        n = len(h_chunk)
        logits = torch.mm(h_chunk, w.t(), out=buffer[:n]).float()  # (n, V): the buffer itself in fp32
        highest, target_logit = logits.amax(1), logits[row[:n], t_chunk]
        p = torch.softmax(logits, 1, out=logits)  # one fused pass, in place
        # the largest probability is 1 / sum(exp(logit - highest)): log-sum-exp without one more pass over the chunk
        loss += (highest - p.amax(1).log() - target_logit).sum()
        if grad_hidden is not None and grad_weight is not None:
            p[row[:n], t_chunk] -= 1.0
            grad_logits = p.to(dtype)  # times N
            grad_hidden[start : start + n] = grad_logits @ w
            if dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), h_chunk)
            else:  # sums over the chunks stay in fp32
                grad_weight += grad_logits.t() @ h_chunk
    if grad_hidden is not None and grad_weight is not None:
        ctx.save_for_backward(grad_hidden.div_(N), grad_weight.div_(N))
    return loss / N
