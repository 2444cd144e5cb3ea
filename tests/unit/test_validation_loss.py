"""Validation loss: the mean over tokens, not over batches."""

import math

import pytest
import torch
from torch import Tensor

from gpt2_lightning.evals.validation import MeanLoss, validation_loss


def first_id(ids: Tensor) -> Tensor:
    """A loss that the test chooses: the first token id of the batch."""
    return ids[0, 0].float()


def batch(loss: int, sequences: int, block_size: int = 4) -> Tensor:
    return torch.full((sequences, block_size + 1), loss, dtype=torch.int32)


def test_uneven_batches_count_by_their_tokens() -> None:
    batches = [batch(2, sequences=3), batch(5, sequences=1)]
    assert validation_loss(first_id, batches, "cpu") == (2 * 12 + 5 * 4) / 16


def test_a_nan_is_not_dropped() -> None:
    mean = MeanLoss()
    mean.update(torch.tensor(1.0), weight=4)
    mean.update(torch.tensor(math.nan), weight=4)
    assert math.isnan(mean.compute())


def test_no_gradient_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    seen = []

    def loss_of(ids: Tensor) -> Tensor:
        seen.append(first_id(ids) * weight)
        return seen[-1]

    assert validation_loss(loss_of, [batch(3, sequences=1)], "cpu") == pytest.approx(3)
    assert not seen[0].requires_grad
