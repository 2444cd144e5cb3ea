"""Validation loss: nats per token over a split of the data."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean loss per token over micro-batches and ranks. A NaN makes the mean NaN.

    torchmetrics' ``MeanMetric`` drops NaN by default, and ignores the weights with ``nan_strategy="disable"`` (1.9).
    """

    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: int) -> None:
        """Adds the mean ``loss`` of ``weight`` tokens."""
        self.total += loss.float() * weight
        self.tokens += weight

    def compute(self) -> Tensor:
        return self.total / self.tokens


@torch.no_grad()
def validation_loss(
    loss_of: Callable[[Tensor], Tensor], batches: Iterable[Tensor], device: torch.device | str
) -> float:
    """Mean loss per token, in nats, over the batches of all ranks.

    Args:
        loss_of: token ids (B, T + 1) → mean loss over the B·T predicted tokens.
        batches: this rank's batches of token ids (B, T + 1).
        device: where ``loss_of`` computes.
    """
    mean = MeanLoss().to(device)
    for ids in batches:
        mean.update(loss_of(ids.to(device, non_blocking=True)), weight=ids[:, 1:].numel())
    return float(mean.compute())
