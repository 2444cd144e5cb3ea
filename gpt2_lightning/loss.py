"""Next-token cross-entropy from hidden states: logits = hidden @ weight.T, then their loss, whole or chunk by chunk.

With 50,304 columns the logits are the largest tensor of a GPT-2 step (B=16, T=1024: 3.3 GB in fp32), and on a CPU much
of the step goes into writing and re-reading them. The chunked form computes the gradient together with the loss, one
chunk of tokens at a time in one buffer that is kept, and so never holds the whole logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 512 * 50304
"""Logits held at once by the chunked loss: 103 MB in fp32. Smaller chunks make slower matmuls on a CPU."""

ROWS = 32
"""Tokens whose logits go through the softmax together on a CPU: 6 MB in fp32, so that its passes stay in the cache."""


def chunk_of(vocab_size: int) -> int:
    """Tokens per chunk for so many columns."""
    return max(1, CHUNK_LOGITS // vocab_size)


class LinearCrossEntropy:
    """Mean cross-entropy of ``targets`` under ``softmax(hidden @ weight.T)``: a scalar, in nats, fp32.

    Both forms follow the autocast in force as PyTorch's own would: matmuls in its type, softmax and loss in fp32.

    Args:
        chunk_tokens: tokens per chunk; None computes all at once.
    """

    def __init__(self, chunk_tokens: int | None = None) -> None:
        self.chunk_tokens = chunk_tokens
        # kept from call to call: fresh memory costs a CPU more than the softmax does
        self.logits = torch.empty(0)  # of a chunk, in the matmuls' type
        self.rows = torch.empty(0)  # some of them in fp32

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, C), weight (V, C): the classifier, one row per token id; targets (N,)."""
        if self.chunk_tokens is None:
            return F.cross_entropy(F.linear(hidden, weight), targets)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        size = (min(self.chunk_tokens, len(hidden)), len(weight))
        if (self.logits.size(), self.logits.dtype, self.logits.device) != (size, dtype, hidden.device):
            self.logits = torch.empty(size, dtype=dtype, device=hidden.device)
            rows = min(ROWS, size[0]) if device_type == "cpu" else size[0]
            self.rows = torch.empty(rows, size[1], device=hidden.device)
        if not torch.is_grad_enabled():  # to the function below a parameter wants its gradient even then
            hidden, weight = hidden.detach(), weight.detach()
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, self.logits, self.rows)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # the casts are made by hand, once
            loss, ctx.gradients = _loss_and_gradients(hidden, weight, targets, logits, rows, any(ctx.needs_input_grad))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        assert ctx.gradients is not None, "scaled in place, so there is one backward"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, buffer: Tensor, rows: Tensor, want_gradients: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    N, chunk_tokens = len(hidden), len(buffer)
    h, w = hidden.to(buffer.dtype), weight.to(buffer.dtype)
    loss = torch.zeros((), device=h.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight) if want_gradients else weight
    for start in range(0, N, chunk_tokens):
        h_chunk, t_chunk = h[start : start + chunk_tokens], targets[start : start + chunk_tokens]
        logits = torch.mm(h_chunk, w.t(), out=buffer[: len(h_chunk)])  # (chunk_tokens, V)
        for row in range(0, len(h_chunk), len(rows)):
            loss += _loss_into_gradient(logits[row : row + len(rows)], t_chunk[row : row + len(rows)], rows)
        if want_gradients:
            grad_logits = logits  # by now, times N: the small factors below make up for that
            grad_hidden[start : start + chunk_tokens] = (grad_logits @ w).float() / N
            if grad_weight.dtype == buffer.dtype:
                grad_weight.addmm_(grad_logits.t(), h_chunk / N)
            else:  # sums over the chunks stay in fp32
                grad_weight += grad_logits.t() @ (h_chunk / N)
    return loss / N, (grad_hidden, grad_weight) if want_gradients else None


def _loss_into_gradient(logits: Tensor, targets: Tensor, buffer: Tensor) -> Tensor:
    """The summed cross-entropy of a few rows (n, V), whose logits become its gradient: softmax minus one-hot."""
    n = len(logits)
    p = logits if logits.dtype == torch.float32 else buffer[:n].copy_(logits)
    row = torch.arange(n, device=p.device)
    highest, target_logit = p.amax(1), p[row, targets]
    torch.softmax(p, 1, out=p)  # one fused pass, in place
    # the largest probability is 1 / sum(exp(logit - highest)): log-sum-exp without one more pass over the rows
    loss = (highest - p.amax(1).log() - target_logit).sum()
    p[row, targets] -= 1.0
    logits.copy_(p)  # nothing to do in fp32, where they are the same memory
    return loss
