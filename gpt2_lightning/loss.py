"""Next-token cross-entropy from hidden states: logits = hidden @ weight.T, then the loss, at once or in chunks.

With 50,304 columns, the logits are the largest tensor of a GPT-2 step (3.3 GB in fp32 for B=16, T=1024), and a CPU
spends much of the step writing and reading them. The chunked form computes the gradient together with the loss, for one
chunk of tokens at a time in a reused buffer, so the full logits never exist.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 512 * 50304
"""Logits in one chunk: 103 MB in fp32. Smaller chunks make the matmuls slower on a CPU."""

SOFTMAX_ROWS = 32
"""Tokens that a CPU passes through the softmax together: 6 MB of logits in fp32, which stay in the cache."""


def tokens_per_chunk(vocab_size: int) -> int:
    """Chunk size, in tokens, for a vocabulary of ``vocab_size``."""
    return max(1, CHUNK_LOGITS // vocab_size)


class LinearCrossEntropy:
    """Mean cross-entropy, in nats, of ``softmax(hidden @ weight.T)``. Returns a scalar in fp32.

    Under autocast the matmuls run in its dtype, softmax and loss in fp32, as with PyTorch's own functions.

    Args:
        chunk_tokens: tokens per chunk; None computes all tokens at once.
    """

    def __init__(self, chunk_tokens: int | None = None) -> None:
        self.chunk_tokens = chunk_tokens
        # buffers are kept between calls: on a CPU, allocating fresh memory takes longer than the softmax
        self.logits = torch.empty(0)  # (chunk_tokens, V), in the dtype of the matmuls
        self.softmax_buffer = torch.empty(0)  # (SOFTMAX_ROWS, V), fp32

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Computes the loss of hidden states (N, C) for target ids (N,); ``weight`` (V, C) is the head's."""
        if self.chunk_tokens is None:
            return F.cross_entropy(F.linear(hidden, weight), targets)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        size = (min(self.chunk_tokens, len(hidden)), len(weight))
        if (self.logits.size(), self.logits.dtype, self.logits.device) != (size, dtype, hidden.device):
            self.logits = torch.empty(size, dtype=dtype, device=hidden.device)
            rows = min(SOFTMAX_ROWS, size[0]) if device_type == "cpu" else size[0]
            self.softmax_buffer = torch.empty(rows, size[1], device=hidden.device)
        if not torch.is_grad_enabled():  # ctx.needs_input_grad is True for parameters even under no_grad
            hidden, weight = hidden.detach(), weight.detach()
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, self.logits, self.softmax_buffer)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logits: Tensor, softmax_buffer: Tensor
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # casts are explicit below, once per call
            loss, ctx.gradients = _loss_and_gradients(
                hidden, weight, targets, logits, softmax_buffer, any(ctx.needs_input_grad)
            )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        assert ctx.gradients is not None, "gradients are scaled in place: backward can run only once"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, logits: Tensor, softmax_buffer: Tensor, want_gradients: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    N, chunk_tokens, rows = len(hidden), len(logits), len(softmax_buffer)
    h, w = hidden.to(logits.dtype), weight.to(logits.dtype)
    loss = torch.zeros((), device=h.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight) if want_gradients else weight
    for start in range(0, N, chunk_tokens):
        h_chunk, t_chunk = h[start : start + chunk_tokens], targets[start : start + chunk_tokens]
        chunk = torch.mm(h_chunk, w.t(), out=logits[: len(h_chunk)])  # (chunk_tokens, V)
        for row in range(0, len(h_chunk), rows):
            loss += _replace_by_gradient(chunk[row : row + rows], t_chunk[row : row + rows], softmax_buffer)
        if want_gradients:  # chunk now holds N times the gradient of the logits; the factor 1 / N is applied below
            grad_hidden[start : start + chunk_tokens] = (chunk @ w).float() / N
            if grad_weight.dtype == chunk.dtype:
                grad_weight.addmm_(chunk.t(), h_chunk / N)
            else:  # sum over the chunks in fp32
                grad_weight += chunk.t() @ (h_chunk / N)
    return loss / N, (grad_hidden, grad_weight) if want_gradients else None


def _replace_by_gradient(logits: Tensor, targets: Tensor, buffer: Tensor) -> Tensor:
    """Returns the summed cross-entropy of logits (n, V) and overwrites them with its gradient, softmax - one-hot."""
    n = len(logits)
    p = logits if logits.dtype == torch.float32 else buffer[:n].copy_(logits)
    row = torch.arange(n, device=p.device)
    max_logit, target_logit = p.amax(1), p[row, targets]
    torch.softmax(p, 1, out=p)  # in place, one fused kernel
    # the largest probability is 1 / sum(exp(logit - max_logit)), so log-sum-exp needs no further pass over the logits
    loss = (max_logit - p.amax(1).log() - target_logit).sum()
    p[row, targets] -= 1.0
    logits.copy_(p)  # no copy in fp32, where p is logits
    return loss
